"""GRPO's clipped surrogate (arXiv 2402.03300, Eq. 3), with clip-higher (DAPO, arXiv 2503.14476) and dual clip.

Departures: no KL to a reference policy (KDRL's has none either), and `logprobs - old` is clamped to +-20 nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import PolicyOutput, Sums, Term, inside, log_ratio
from kdrl_pl.losses.modulation.base import Modulation
from kdrl_pl.schedules import Schedule


class PolicyGradient(Term):
    """Reinforcement learning from the rule's reward: `-min(rho A, clip(rho, 1 - low, 1 + high) A)`.

    `rho = exp(logprobs - old_logprobs)`, 1 in value when a rollout is used for one update. The gradient in
    `logprobs` is `-rho A` where the surrogate is not clipped, 0 elsewhere.

    Args:
        coef: weight of the term, a number or a schedule over rollouts.
        clip_low: the ratio is clipped below at 1 - clip_low for negative advantages.
        clip_high: the ratio is clipped above at 1 + clip_high for positive advantages; DAPO uses 0.28.
        dual_clip: for negative advantages the loss is at most dual_clip * |A| (arXiv 1912.09729 uses 3); null is off.
        modulation: what the teacher makes of ratio and advantages before the clip, by class_path; see
            kdrl_pl.losses.modulation. Where model.distillation masks the teacher it has no say here either.
    """

    only_normaliser: str | None = None  # the one that the term is sound under; None = any

    needs_advantages = True

    def __init__(
        self,
        coef: Schedule | float = 1.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        modulation: Modulation | None = None,
    ) -> None:
        super().__init__(coef)
        if not 0 <= clip_low <= 1:
            raise ValueError(f"clip_low is {clip_low}; a ratio is clipped at 1 - clip_low, so it must lie in [0, 1]")
        if clip_high < 0:
            raise ValueError(f"clip_high is {clip_high}; a ratio is clipped at 1 + clip_high, so it must be >= 0")
        if dual_clip is not None and dual_clip <= 1 + clip_high:
            raise ValueError(f"dual_clip is {dual_clip}; it bounds the ratio from above: use more than 1 + clip_high")
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.modulation = modulation
        self.needs_teacher = modulation is not None

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Tensor:
        ratio, advantages = self.ratio_and_advantages(policy, experience)  # (B, T) each
        surrogate = torch.minimum(ratio * advantages, self._clip(ratio) * advantages)  # (B, T)
        if self.dual_clip is not None:
            bounded = torch.maximum(surrogate, self.dual_clip * advantages)
            surrogate = torch.where(advantages < 0, bounded, surrogate)
        return -surrogate

    def ratio_and_advantages(self, policy: PolicyOutput, experience: Experience) -> tuple[Tensor, Tensor]:
        """(B, T) ratio with gradient, and (B, T) advantages, as the surrogate takes them."""
        ratio = log_ratio(policy, experience)
        advantages = experience.advantages[:, None].expand_as(ratio)
        if self.modulation is not None:
            ratio, advantages = self.modulation(ratio, advantages, policy.cell_logprobs, experience)
        return ratio.exp(), advantages

    def _clip(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(1 - self.clip_low, 1 + self.clip_high)

    def weights(self, experience: Experience) -> Tensor:
        return inside(experience.token_weights[:, None], experience.response_mask)

    def active(self, experience: Experience) -> Tensor:
        return (experience.advantages != 0) & super().active(experience)

    def teacher_tokens(self, experience: Experience) -> Tensor:
        if self.modulation is None:
            return super().teacher_tokens(experience)
        return self.modulation.rows(experience.advantages)[:, None] & experience.response_mask

    def metrics(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Sums:
        mask = experience.response_mask
        ratio, advantages = (x.detach() for x in self.ratio_and_advantages(policy, experience))
        clipped = (self._clip(ratio) * advantages < ratio * advantages) & mask
        tokens = mask.sum().float()
        return {
            "train/clip_fraction": (clipped.sum().float(), tokens),
            "train/importance_ratio": (inside(log_ratio(policy, experience).detach().exp(), mask).sum(), tokens),
        }
