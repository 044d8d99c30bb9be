"""The workloads: models, prompts and response lengths, the same files for every library that is measured.

Models have random weights. A tokenizer of numbered words reads one token per word, so that a prompt's length is what
the table says; the end token has the largest id.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WARM_UP_TOKENS = 4  # length of every response of the step before the clock runs


@dataclass(frozen=True)
class Shape:
    """A Llama: hidden size, feed-forward width, layers, attention heads, key-value heads."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def body_weights(self) -> int:
        """Weights of all layers that every token is multiplied with; embeddings and head are not among them."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate)


@dataclass(frozen=True)
class Workload:
    """One training step, over and over.

    Args:
        title: in words, for tables.
        student, teacher: their shapes.
        vocabulary: words, the padding and end tokens included.
        prompts, group: a rollout has prompts x group rows.
        prompt_tokens, response_tokens: length of each prompt and longest response.
        uneven: responses end at the lengths of a table, few of them long; otherwise all are of full length.
        tied: the head is the embedding.
        precision: "32-true" or "bf16-mixed".
        steps: measured in one process, after a short warm-up step.
    """

    title: str
    student: Shape
    teacher: Shape
    vocabulary: int
    prompts: int
    group: int
    prompt_tokens: int
    response_tokens: int
    uneven: bool = False
    tied: bool = False
    precision: str = "32-true"
    steps: int = 2

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    def lengths(self, step: int) -> list[int]:
        """Response tokens of each row, the end token included, in prompt-major order; step 0 is the warm-up."""
        if step == 0:
            return [WARM_UP_TOKENS] * self.rows
        if not self.uneven:
            return [self.response_tokens] * self.rows
        numbers = random.Random(step)
        shortest = min(8, self.response_tokens)
        spread = self.response_tokens - shortest
        lengths = [shortest + round(spread * numbers.random() ** 3) for _ in range(self.rows)]
        lengths[numbers.randrange(self.rows)] = self.response_tokens  # every step lasts as long as the budget allows
        return lengths

    @property
    def model_weights(self) -> int:
        """Weights of the student, embedding and head included (norms are not)."""
        return self.student.body_weights + self.vocabulary * self.student.hidden * (1 if self.tied else 2)


_SMALL, _SMALL_TEACHER = Shape(256, 672, 4, 8, 8), Shape(512, 1368, 6, 8, 8)  # 7.3 M and 27.3 M with 8,192 words
_WIDE = Shape(256, 672, 2, 8, 8)
_SMOLLM = Shape(576, 1536, 30, 9, 3)  # SmolLM2-135M's

WORKLOADS = {
    "a": Workload("7.3 M under 27.3 M, equal lengths", _SMALL, _SMALL_TEACHER, 8192, 2, 8, 16, 64, steps=5),
    "b": Workload(
        "2 M under 8 M, 64 rows of very uneven length up to 256",
        Shape(128, 448, 4, 4, 4),
        Shape(256, 616, 8, 8, 8),
        4096,
        8,
        8,
        16,
        256,
        uneven=True,
        steps=3,
    ),
    "c": Workload("16 responses of 64 to one prompt of 512", _SMALL, _SMALL_TEACHER, 8192, 1, 16, 512, 64, steps=3),
    "d": Workload("151,936 words, hidden 256, 2 layers", _WIDE, _WIDE, 151_936, 2, 8, 16, 64, steps=2),
    "e32": Workload("135 M under 135 M, fp32", _SMOLLM, _SMOLLM, 49_152, 4, 8, 16, 64, tied=True, steps=1),
    "e16": Workload(
        "135 M under 135 M, bf16",
        _SMOLLM,
        _SMOLLM,
        49_152,
        4,
        8,
        16,
        64,
        tied=True,
        precision="bf16-mixed",
        steps=1,
    ),
}


def miniature(workload: Workload) -> Workload:
    """The same in a second or two: to see that a program works, not to measure anything."""
    tiny = Shape(32, 64, 1, 2, 2 if workload.student.heads == workload.student.kv_heads else 1)
    return replace(
        workload,
        student=tiny,
        teacher=replace(tiny, layers=2),
        vocabulary=min(workload.vocabulary, 512),
        prompts=2,
        group=4,
        prompt_tokens=min(workload.prompt_tokens, 24),
        response_tokens=12,
        steps=1,
    )


def choose(names: str, small: bool) -> dict[str, Workload]:
    """Workloads by their names, comma between; `small` makes miniatures of them.

    Raises:
        ValueError: there is no workload of that name.
    """
    unknown = set(names.split(",")) - WORKLOADS.keys()
    if unknown:
        raise ValueError(f"no workload {', '.join(sorted(unknown))}; expected some of {', '.join(WORKLOADS)}")
    return {name: miniature(WORKLOADS[name]) if small else WORKLOADS[name] for name in names.split(",")}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words "w1", "w2", ...: one token each; `<pad>` is 0, `<eos>` the last id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", *(f"w{i}" for i in range(1, vocabulary - 1)), "<eos>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def prompt_texts(workload: Workload, rollouts: int) -> list[str]:
    """Texts of `rollouts` x prompts prompts, all different, `prompt_tokens` words each."""
    numbers = random.Random(0)
    return [
        " ".join(f"w{numbers.randrange(1, workload.vocabulary - 1)}" for _ in range(workload.prompt_tokens))
        for _ in range(rollouts * workload.prompts)
    ]


def write_models(workload: Workload, folder: Path) -> None:
    """Hugging Face folders `student` and `teacher` with random weights, and the tokenizer in both."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer(workload.vocabulary)
    for seed, (name, shape) in enumerate((("student", workload.student), ("teacher", workload.teacher))):
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=workload.vocabulary,
            tie_word_embeddings=workload.tied,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
