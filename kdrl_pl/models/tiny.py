"""Tiny models of the quick start and the testbeds: a Llama on characters with random weights, for `kdrl sft` to teach.

python -m kdrl_pl.models.tiny FOLDER --hidden 64 --layers 2 --task addition
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kdrl_pl.data.tasks import addition, knights
from kdrl_pl.models.character_tokenizer import character_tokenizer

ALPHABETS = {"addition": addition.ALPHABET, "knights": knights.ALPHABET}


def write_tiny(folder: Path, hidden: int, layers: int, alphabet: str = addition.ALPHABET, intermediate: int = 0) -> int:
    """Write config, tokenizer and random weights (seed 0) of a Llama; returns its number of parameters.

    Args:
        folder: where to.
        hidden: hidden size; a multiple of 64 keeps 4-bit quantisation possible.
        layers: decoder layers.
        alphabet: characters the tokenizer knows.
        intermediate: width of the feed-forward part; 0 = 2.5 times hidden, rounded to a multiple of 64.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer(alphabet)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate or round(2.5 * hidden / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 32, 1),
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--intermediate", type=int, default=0)
    parser.add_argument("--task", choices=ALPHABETS, default="addition")
    options = parser.parse_args()
    alphabet = ALPHABETS[options.task]
    parameters = write_tiny(options.folder, options.hidden, options.layers, alphabet, options.intermediate)
    print(f"wrote {options.folder}: {parameters:,} parameters, random weights")


if __name__ == "__main__":
    main()
