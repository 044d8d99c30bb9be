"""Distilled RL: the teacher says which tokens of a good response earned its advantage (arXiv 2607.17247; METHOD §5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.modulation.base import Modulation, old_gap


class DistilledRL(Modulation):
    """`A' = A * w` where A > 0, else A; `w = clip(e^d_old, 1/bound, bound)` over its geometric mean in the response.

    `d_old = teacher - old` is detached, so the gradient in `logprobs` is `rho A w` where the surrogate is not clipped.

    Args:
        bound: largest factor before the division by the mean; the paper's 3.

    Raises:
        ValueError: a bound that is not above 1.
    """

    def __init__(self, bound: float = 3.0) -> None:
        if not 1 < bound < math.inf:
            raise ValueError(f"bound is {bound}; factors lie between 1 / bound and bound, so it must exceed 1")
        self.bound = bound

    def __call__(
        self, log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, experience: Experience
    ) -> tuple[Tensor, Tensor]:
        asked = experience.teacher_mask
        limit = math.log(self.bound)
        gap = old_gap(log_ratio, logprobs, experience)  # (B, T), zero where the teacher was not asked
        log_weight = gap.clamp(-limit, limit)
        mean = log_weight.sum(1, keepdim=True) / asked.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
        weighted = asked & (advantages > 0)
        return log_ratio, torch.where(weighted, advantages * (log_weight - mean).exp(), advantages)

    def rows(self, advantages: Tensor) -> Tensor:
        return advantages > 0
