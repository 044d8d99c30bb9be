"""Log-probs from hidden states and output head, a chunk of positions at a time: no (B, T, V) logits in memory.

Each chunk is recomputed in the backward pass, so memory holds one chunk of logits, whatever the number of tokens and
the size of the vocabulary. Where one chunk is enough it is kept: that saves a quarter of the head's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24  # logits per chunk, 64 MB of fp32: 110 positions over 152,000 words


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
        weight: (V, H).
        bias: (V,) or None.
        scale: logits are multiplied by it (Cohere, Granite).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2); None is off.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logprobs(self, hidden: Tensor, temperature: float) -> Tensor:
        """(N, V) float32 log-probs in nats of hidden states (N, H) at a sampling temperature."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits / temperature).log_softmax(-1)


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

    def score(h: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor, teacher_h: Tensor | None) -> tuple:
        logprobs = Head(weight, bias, head.scale, head.softcap).logprobs(h, temperature)  # (n, V)
        token = logprobs.gather(1, t[:, None])[:, 0]
        if read is None:
            return token, {}
        with torch.no_grad():
            of_teacher = None if teacher_h is None else teacher_head.logprobs(teacher_h, temperature)
        return token, read(Vocabulary(logprobs, t, of_teacher))

    chunks = []
    words = head.weight.shape[0]
    size = max(CHUNK // words, 1)
    recompute = torch.is_grad_enabled() and len(tokens) > size
    parts = hidden.split(size), tokens.split(size)
    of_teacher = [None] * len(parts[0]) if teacher_hidden is None else teacher_hidden.split(size)
    for hidden_part, tokens_part, teacher_part in zip(*parts, of_teacher, strict=True):
        arguments = (hidden_part, head.weight, head.bias, tokens_part, teacher_part)
        if recompute:
            chunks.append(checkpoint(score, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(score(*arguments))
    logprobs, readings = zip(*chunks, strict=True)
    return TokenScores(torch.cat(logprobs), {name: torch.cat([r[name] for r in readings]) for name in readings[0]})
