"""RLSD: an advantage grows where the teacher agrees with it and shrinks where not (arXiv 2604.03128; METHOD §5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.modulation.base import Modulation, old_gap


class RLSD(Modulation):
    """`A' = A * ((1 - strength) + strength * clip(e^(sign(A) d_old), 1 - bound, 1 + bound))`.

    `d_old = teacher - old` is detached, so the gradient in `logprobs` is `rho A'` where the surrogate is not clipped.

    Args:
        strength: lambda, 0 (plain GRPO) to 1; the paper uses 1 and 0.5.
        bound: largest change of an advantage, as a share of it; below 1, so that no advantage turns its sign.

    Raises:
        ValueError: strength outside [0, 1] or bound outside (0, 1).
    """

    def __init__(self, strength: float = 1.0, bound: float = 0.2) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it is the share of the teacher's weight: expected 0 to 1")
        if not 0 < bound < 1:
            raise ValueError(f"bound is {bound}; weights lie between 1 - bound and 1 + bound: use more than 0, below 1")
        self.strength, self.bound = strength, bound

    def __call__(
        self, log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, experience: Experience
    ) -> tuple[Tensor, Tensor]:
        agreement = advantages.sign() * old_gap(log_ratio, logprobs, experience)  # (B, T)
        factor = agreement.clamp(math.log(1 - self.bound), math.log(1 + self.bound)).exp()
        weight = (1 - self.strength) + self.strength * factor
        return log_ratio, torch.where(experience.teacher_mask, advantages * weight, advantages)
