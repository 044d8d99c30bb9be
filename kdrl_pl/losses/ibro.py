"""IBRO: more entropy where the answer was good, less where it was bad (arXiv 2507.18391; METHOD §7)."""

from __future__ import annotations

from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.losses.base import PolicyOutput, Sums, Term, inside
from kdrl_pl.schedules import Schedule


class IBRO(Term):
    """`-A H_t` per token, `H_t` the entropy of the student's next-token distribution with gradient, beside the
    policy gradient and under the same weights.

    The entropy is taken a chunk of positions at a time and recomputed in the backward pass, so it costs no memory
    beyond one chunk of probabilities.

    Args:
        coef: c, a number or a schedule over rollouts; it has no default, since it weighs nats against advantages.
    """

    needs_advantages = True
    reads_vocabulary = True

    def __init__(self, coef: Schedule | float) -> None:
        super().__init__(coef)

    def read(self, vocabulary: Vocabulary) -> dict[str, Tensor]:
        return {"entropy": -(vocabulary.logprobs.exp() * vocabulary.logprobs).sum(1)}

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Tensor:
        return -experience.advantages[:, None] * policy.reading("entropy")

    def weights(self, experience: Experience) -> Tensor:
        return inside(experience.token_weights[:, None], experience.response_mask)

    def active(self, experience: Experience) -> Tensor:
        return (experience.advantages != 0) & super().active(experience)

    def metrics(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Sums:
        if "entropy" not in policy.readings:
            return {}
        mask = experience.response_mask
        return {"train/entropy": (inside(policy.readings["entropy"].detach(), mask).sum(), mask.sum().float())}
