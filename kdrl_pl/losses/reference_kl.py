"""KL to a reference: the student as it was some rollouts ago (hard resets: ProRL, arXiv 2507.12507; METHOD §7).

With `d = reference - logprobs`, detached, of the current student at every update, the term is `-rho d` on every
response token: its gradient is that of KL(student || reference) at the visited states.

Departures: the period between resets is fixed, in rollouts; and GRPO puts k3 into the loss (arXiv 2402.03300, Eq. 4),
whose gradient is that of the forward KL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import PolicyOutput, Sums, Term, inside, log_ratio
from kdrl_pl.schedules import Schedule


class ReferenceKL(Term):
    """Reverse KL to a frozen copy of the student, on the student's own tokens.

    The reference is the starting student until the first reset. It takes the memory of the student's weights once more,
    is scored with every rollout, and stands in checkpoints once it has been reset. Tokens weigh as in the policy
    gradient (model.normaliser).

    Args:
        coef: weight of the term, a number or a schedule over rollouts.
        reset_every: rollouts after which the reference becomes a copy of the current student; null never does.
        reset_optimizer: forget the optimizer's moments at each reset, as ProRL does: they are averages of a gradient
            that pulled to the old reference. Adam's next steps are then as large as those at the start of a run.

    Raises:
        ValueError: reset_every is below 1.
    """

    def __init__(
        self, coef: Schedule | float = 1e-3, reset_every: int | None = None, reset_optimizer: bool = True
    ) -> None:
        super().__init__(coef)
        if reset_every is not None and reset_every < 1:
            raise ValueError(f"reset_every is {reset_every}; expected rollouts between two resets, or null for none")
        self.reset_every, self.reset_optimizer = reset_every, reset_optimizer

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Tensor:
        return -log_ratio(policy, experience).exp() * reference_gap(policy, experience)

    def weights(self, experience: Experience) -> Tensor:
        return inside(experience.token_weights[:, None], experience.response_mask)

    def resets_after(self, rollout: int) -> bool:
        """Whether the reference is replaced between this rollout and the next."""
        return self.reset_every is not None and (rollout + 1) % self.reset_every == 0

    def metrics(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Sums:
        if experience.reference_logprobs is None:  # the coefficient is 0, so nobody asked the reference
            return {}
        d = reference_gap(policy, experience)  # (B, T)
        ratio, tokens = log_ratio(policy, experience).detach().exp(), experience.response_mask.sum().float()
        return {
            "reference/kl": ((-ratio * d).sum(), tokens),
            "reference/kl_k3": ((ratio * (torch.expm1(d) - d)).sum(), tokens),
        }


def reference_gap(policy: PolicyOutput, experience: Experience) -> Tensor:
    """(B, T) `d = reference_logprobs - logprobs` in nats, detached; zero outside the response mask."""
    return inside(experience.reference_logprobs - policy.logprobs.detach(), experience.response_mask)
