"""Prompts read once against rows read whole: log-probs, vocabulary readings, hidden states and gradients."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.models.shared_prompts import SharedPrompts

VOCABULARY, WIDTH = 23, 15
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    ),
}
SLIDING = {
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=4)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=4)),
}
# Three groups with prompts of 6, 3 and 6 tokens; responses of 1 to 9 tokens.
GROUP = torch.tensor([4, 4, 4, 1, 1, 9])
PROMPTS = torch.tensor([6, 6, 6, 3, 3, 6])
RESPONSES = torch.tensor([9, 1, 4, 2, 7, 5])


def make(make_model, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(make_model().to(dtype), VOCABULARY).eval()


def rows() -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (6, WIDTH), generator=torch.Generator().manual_seed(1))
    ids[1, :6], ids[2, :6], ids[4, :3] = ids[0, :6], ids[0, :6], ids[3, :3]
    column = torch.arange(WIDTH)
    return ids, (column >= PROMPTS[:, None]) & (column < (PROMPTS + RESPONSES)[:, None])


def read(vocabulary: Vocabulary) -> dict[str, Tensor]:
    return {"entropy": -(vocabulary.logprobs.exp() * vocabulary.logprobs).sum(-1)}


def both(student: LanguageModel, mask: Tensor, **options):
    ids, shared = rows()[0], SharedPrompts(GROUP, PROMPTS)
    return [student.token_logprobs(ids, mask, 0.7, shared=form, **options) for form in (None, shared)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_the_same_numbers_and_gradients(family: str, dtype: torch.dtype) -> None:
    # Red: positions that start anew behind the prompt, padding of short prompts seen, the first response token
    # predicted from the wrong place, one row's gradient lost where the prompt's keys are handed on.
    student = make(FAMILIES[family], dtype)
    tolerance = 1e-12 if (family, dtype) == ("gpt2", torch.float64) else 1e-6  # RMS norms round to fp32
    assert student.shares_prompts
    outputs = both(student, rows()[1], read=read)
    weight = torch.linspace(-1, 2, 6 * WIDTH, dtype=dtype).view(6, WIDTH)
    gradients = []
    for output in outputs:
        student.zero_grad()
        ((output.logprobs + 0.3 * output.readings["entropy"]) * weight).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    for name in ("logprobs", "entropy"):
        whole, once = (o.logprobs if name == "logprobs" else o.readings[name] for o in outputs)
        assert (whole - once).norm() <= tolerance * whole.norm()
    assert (gradients[0] - gradients[1]).norm() <= tolerance * gradients[0].norm()


def test_prompts_of_one_length_need_no_mask() -> None:
    # Red: the path without holes between prompt and response, which hands no mask to the model.
    student, (ids, mask) = make(FAMILIES["llama"]), rows()
    pick = [0, 1, 2, 5]
    shared = SharedPrompts(GROUP[pick], PROMPTS[pick])
    whole = student.token_logprobs(ids[pick], mask[pick]).logprobs
    assert (student.token_logprobs(ids[pick], mask[pick], shared=shared).logprobs - whole).abs().max() < 1e-12


def test_some_tokens_of_some_rows_and_tokens_of_the_prompt() -> None:
    # Red: positions taken from the response mask instead of the mask that was asked with (a teacher's).
    student, (ids, mask) = make(FAMILIES["llama"]), rows()
    mask = mask & (torch.arange(WIDTH) % 3 == 0)
    mask[2], mask[3, 1:3], mask[0, 4] = False, True, True
    whole, once = both(student, mask, return_hidden=True)
    assert bool(whole.hidden[mask].any()) and (whole.hidden - once.hidden).abs().max() < 1e-12
    assert (whole.logprobs - once.logprobs).abs().max() < 1e-12
    nothing = student.token_logprobs(ids, torch.zeros_like(mask), shared=SharedPrompts(GROUP, PROMPTS)).logprobs
    assert not nothing.any()


def test_fewer_tokens_go_through_the_model() -> None:
    # Red: the prompt read once per row all the same. Prompts 3 x 6, responses 6 rows x 8 (the last predicts nothing).
    student, seen = make(FAMILIES["llama"]), []
    student.model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    both(student, rows()[1])
    assert seen == [(6, WIDTH), (3, 6), (6, 8)]


@pytest.mark.parametrize("family", SLIDING)
def test_sliding_windows_are_read_whole(family: str) -> None:
    # Red: a window that counts cache columns, with the holes between prompt and response in it.
    assert not make(SLIDING[family], torch.float32).shares_prompts


class Drifting(transformers.LlamaForCausalLM):
    """A decoder that behaves differently behind a cache, as no configuration field says."""

    def forward(self, *args, past_key_values=None, position_ids=None, **kwargs):
        return super().forward(*args, past_key_values=past_key_values, position_ids=None, **kwargs)


class DriftingBody(transformers.LlamaModel):
    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        out = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and past_key_values.get_seq_length() > input_ids.shape[1]:
            out.last_hidden_state = out.last_hidden_state * 1.5
        return out


def test_a_model_that_differs_behind_a_cache_is_found_out() -> None:
    # Red: the check left out, or made with prompts of one length or of one group only.
    torch.manual_seed(0)
    model = Drifting(transformers.LlamaConfig(**SIZES))
    model.model.__class__ = DriftingBody
    student = LanguageModel(model, VOCABULARY)
    assert student.uses_own_head and not student.shares_prompts


def test_recomputed_activations_drop_the_cache() -> None:
    # Red: transformers switches the cache off under gradient checkpointing, and responses would see no prompt.
    student = make(FAMILIES["llama"], torch.float32)
    student.model.gradient_checkpointing_enable()
    assert not student.shares_prompts


def test_rows_of_a_group_with_other_prompts_are_refused() -> None:
    ids, mask = rows()
    ids[1, 2] += 1
    with pytest.raises(ValueError, match="different prompts"):
        make(FAMILIES["llama"]).token_logprobs(ids % VOCABULARY, mask, shared=SharedPrompts(GROUP, PROMPTS))
