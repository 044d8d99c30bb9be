"""Exact expectations over one token: every word of a small vocabulary once, weighted by its chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.losses.base import LossOutput, Objective, PolicyOutput, Term


def behind_a_prompt(values: Tensor) -> Tensor:
    """(V, 2): a position for the prompt, garbage, then the values (V,)."""
    return torch.stack([torch.full_like(values, torch.nan), values], 1)


def of_cells(logprobs: Tensor, stops: Sequence[int]) -> Tensor:
    """(V,) log-prob of the cell of each word."""
    together = logprobs[list(stops)].exp().sum().log() if stops else None
    return torch.stack([together if word in stops else x for word, x in enumerate(logprobs)])


def every_word(
    terms: dict[str, Term],
    logits: Tensor,
    teacher: Tensor,
    *,
    old: Tensor | None = None,
    sampler: Tensor | None = None,
    cap: float | None = None,
    stops: Sequence[int] = (),
    advantages: Tensor | None = None,
) -> LossOutput:
    """The expected loss of one token.

    Args:
        terms: the objective.
        logits: (V,) float64 of the current student.
        teacher: (V,) logits of the teacher.
        old: (V,) logits of the student before the first update; None = one update.
        sampler: (V,) logits of what sampled; None = old, or the student.
        cap: the objective's importance_cap.
        stops: the experience's stop_cell.
        advantages: (V,); default 0.
    """
    words = len(logits)
    logprobs, of_teacher = logits.log_softmax(0), teacher.log_softmax(0)
    of_old = logprobs.detach() if old is None else old.log_softmax(0)
    of_sampler = of_old if sampler is None else sampler.log_softmax(0)
    e = Experience.from_rows([[0]] * words, [[word] for word in range(words)], [0.0] * words, [0] * words)
    e.stop_cell, e.teacher_mask = tuple(stops), e.response_mask
    e.advantages = torch.zeros(words, dtype=torch.float64) if advantages is None else advantages
    e.token_weights = of_sampler.exp()
    e.kd_weights = e.token_weights[:, None] * e.response_mask
    e.teacher_logprobs = behind_a_prompt(of_cells(of_teacher, stops))
    e.old_logprobs = None if old is None else behind_a_prompt(of_old)
    e.behavior_logprobs = behind_a_prompt(of_sampler)
    objective = Objective(terms, cap)
    vocabulary = Vocabulary(logprobs.expand(words, -1), torch.arange(words), of_teacher.expand(words, -1))
    read = objective.reader(0, True, stops)
    readings = {} if read is None else read(vocabulary)
    policy = PolicyOutput(behind_a_prompt(logprobs), {name: behind_a_prompt(x) for name, x in readings.items()})
    return objective(policy, e, 0)


def gradient(output: LossOutput, logits: Tensor) -> Tensor:
    """(V,) of the loss in the logits."""
    return torch.autograd.grad(output.loss, logits)[0]
