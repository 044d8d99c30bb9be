"""Log-probs from hidden states and output head, in pieces: no (B, T, V) logits in memory.

Pieces are computed again in the backward pass (`chunked_head`), so memory holds one of them, whatever the number of
tokens and the size of the vocabulary. What fits into one piece is kept: that saves a quarter of the head's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrl_pl.chunked_head import Reading, Readings, TokenLogprobs, compute_dtype, logits_of

CHUNK = 2**24  # logits at a time, 64 MB of fp32: 110 positions over 152,000 words


@dataclass
class Vocabulary:
    """What the models say about every word at N positions: gone again when it has been read.

    Args:
        logprobs: (N, V) float32 nats of the student, with gradient.
        tokens: (N,) int64, the sampled tokens.
        teacher: (N, V) float32 nats of the teacher, without gradient; None where no term asked for it.
    """

    logprobs: Tensor
    tokens: Tensor
    teacher: Tensor | None = None


Reader = Callable[[Vocabulary], dict[str, Tensor]]  # name -> (N,), what a term reads off the vocabulary


@dataclass
class Head:
    """A model's output head with its own logit transform, cut to the tokenizer's vocabulary.

    Args:
        weight: (rows, H).
        bias: (rows,) or None.
        scale: logits are multiplied by it (Cohere, Granite).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2); None is off.
        size: V*, words are the first rows; None takes all. Not cut off beforehand: the gradient of a slice would be
            one more matrix of the head's size.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    size: int | None = None

    @property
    def words(self) -> int:
        """V*."""
        return self.weight.shape[0] if self.size is None else self.size

    def logprobs(self, hidden: Tensor, temperature: float) -> Tensor:
        """(N, V) float32 log-probs in nats of hidden states (N, H) at a sampling temperature."""
        whole = self.words == self.weight.shape[0]  # a slice of everything is a slice all the same to autograd
        weight = self.weight if whole else self.weight[: self.words]
        bias = self.bias if whole or self.bias is None else self.bias[: self.words]
        return self.transformed(logits_of(hidden, weight, bias, compute_dtype(weight)), temperature)

    def transformed(self, logits: Tensor, temperature: float) -> Tensor:
        """(N, V) log-probs of the float32 product (N, V) of hidden states and weight."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


@dataclass
class TokenScores:
    """Per position, (N,) float32: the log-prob of the token in nats, and what the reader made of the vocabulary."""

    logprobs: Tensor
    readings: dict[str, Tensor] = field(default_factory=dict)


def token_scores(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    temperature: float,
    *,
    read: Reader | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
) -> TokenScores:
    """Scores of N tokens given the hidden states that predict them.

    Args:
        hidden: (N, H), gradient flows into it and into the head.
        head: the student's head.
        tokens: (N,) int64.
        temperature: of the sampler.
        read: what else is wanted of the whole vocabulary; of the teacher's too with the next two.
        teacher_hidden: (N, H_T) hidden states of the teacher for the same tokens.
        teacher_head: the teacher's head.
    """

    words = head.words
    if read is None and head.softcap is None and len(tokens) * words > CHUNK:
        block = max(CHUNK // len(tokens), 1)
        factor = head.scale / temperature
        return TokenScores(TokenLogprobs.apply(hidden, head.weight, head.bias, tokens, factor, words, block))
    names: list[str] = []

    def of_logprobs(logprobs: Tensor, rows: slice) -> list[Tensor]:
        readings = {}
        if read is not None:
            with torch.no_grad():
                of_teacher = (
                    None if teacher_hidden is None else teacher_head.logprobs(teacher_hidden[rows], temperature)
                )
            readings = read(Vocabulary(logprobs, tokens[rows], of_teacher))
        names[:] = readings
        return [logprobs.gather(1, tokens[rows, None])[:, 0], *readings.values()]

    if len(tokens) * words <= CHUNK:
        scores = of_logprobs(head.logprobs(hidden, temperature), slice(None))
    else:
        reading = Reading(
            lambda logits, rows: of_logprobs(head.transformed(logits, temperature), rows), max(CHUNK // words, 1), words
        )
        scores = Readings.apply(hidden, head.weight, head.bias, reading)
    return TokenScores(scores[0], dict(zip(names, scores[1:], strict=True)))
