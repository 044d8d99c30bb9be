"""Small models of many architectures for tests of the rollout engine; tests import this module."""

import torch
import transformers

from kdrl_pl.models.language_model import LanguageModel

VOCABULARY = 70  # ids the tokenizer knows; the models have 80 rows
SMALL = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # tied, a random model mostly repeats its last token
}
# Windows of 6 and 5 are shorter than prompts and completions. Dropout and everything not named is the default.
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=6),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=6, sliding_window_pattern=2),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
STOP = 2


def build(name="llama", seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)  # so that log-probs differ from token to token
    return LanguageModel(model.eval(), VOCABULARY)
