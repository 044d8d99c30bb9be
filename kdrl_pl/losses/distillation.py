"""On-policy distillation from a frozen teacher: the second half of KDRL (arXiv 2506.02208, Eq. 8; METHOD §1-4).

With `d = teacher - logprobs`, detached, of the current student at every update:

    k2          -rho f(d)             exact gradient of KL(student || teacher) at the visited states
    forward_kl  -rho (e^d - 1)        k3 as a loss: the gradient of KL(teacher || student), hence the name
    full        sum_v p_v log(p_v/q_v)  the whole vocabulary, no sampling noise from the token

Departures from the paper: the ratio is that of the current update (exact on reused rows too); `d` may be bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.losses.base import PolicyOutput, Sums, Term, inside, log_ratio
from kdrl_pl.losses.transforms import Transform
from kdrl_pl.losses.weights import KD_MASKS, KD_NORMALISERS
from kdrl_pl.schedules import Schedule

ESTIMATORS = ("k2", "forward_kl", "full")
_REFUSED = {
    "k1": "back-propagated, k1 has no teacher in its gradient; use k2, whose gradient is that of the reverse KL",
    "k3": "as a loss k3 has the gradient of the forward KL; write forward_kl if that is meant, k2 for the reverse KL",
}


class Distillation(Term):
    """Reverse KL to the teacher on the student's own tokens.

    Args:
        coef: beta, a number or a schedule over rollouts; the paper's constant is 2e-3 (its best falls from 5e-3).
        estimator: "k2" (exact reverse KL, sampled), "full" (exact reverse KL, whole vocabulary) or "forward_kl"
            (k3 as a loss, for the ablation).
        mask: which rows are distilled: "none" = all, "response" = incorrect responses, "group" = groups with no correct
            response (the paper's two), "negative_advantage" = rows with a negative advantage.
        normaliser: "all" divides by all response tokens, so that beta keeps its meaning; "kept" by the distilled ones.
        transform: bound on d: "none", "clip", "soft_log" or "tanh"; a far teacher needs one.
        transform_bound: nats, for "clip" and "tanh".
        ratio_cap: upper bound on the importance ratio of reused rows; null is off. Not for "full", which has no ratio.
    """

    needs_teacher = True

    def __init__(
        self,
        coef: Schedule | float = 2e-3,
        estimator: str = "k2",
        mask: str = "none",
        normaliser: str = "all",
        transform: str = "none",
        transform_bound: float = 1.0,
        ratio_cap: float | None = None,
    ) -> None:
        super().__init__(coef)
        if estimator in _REFUSED:
            raise ValueError(f"distillation.estimator is {estimator!r}: {_REFUSED[estimator]}")
        for name, value, allowed in (
            ("estimator", estimator, ESTIMATORS),
            ("mask", mask, KD_MASKS),
            ("normaliser", normaliser, KD_NORMALISERS),
        ):
            if value not in allowed:
                raise ValueError(f"distillation.{name} is {value!r}; expected one of {', '.join(allowed)}")
        if estimator == "forward_kl" and transform != "none":
            raise ValueError("a transform bounds d, which forward_kl puts into an exponential first; use estimator k2")
        if ratio_cap is not None and (ratio_cap <= 0 or estimator == "full"):
            raise ValueError(f"ratio_cap is {ratio_cap}; expected a positive number, with estimator k2 or forward_kl")
        self.estimator, self.mask, self.normaliser = estimator, mask, normaliser
        self.transform = Transform(transform, transform_bound)
        self.ratio_cap = ratio_cap
        self.reads_vocabulary = self.reads_teacher_vocabulary = estimator == "full"
        self.sampled = estimator != "full"

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Tensor:
        if self.estimator == "full":
            return policy.readings.get("divergence", torch.zeros_like(policy.logprobs))  # none: nothing is distilled
        d = teacher_gap(policy, experience)  # (B, T)
        pull = self._pull(d)
        ratio = log_ratio(policy, experience).exp()  # (B, T)
        if self.ratio_cap is not None:
            ratio = ratio * (self.ratio_cap / ratio.detach()).clamp(max=1.0)
        return -ratio * pull

    def _pull(self, d: Tensor) -> Tensor:
        return torch.expm1(d) if self.estimator == "forward_kl" else self.transform(d)

    def read(self, vocabulary: Vocabulary) -> dict[str, Tensor]:
        return {"divergence": self.divergence(vocabulary.logprobs, vocabulary.teacher)}

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N,) full-vocabulary divergence of N positions: `sum_v p (log p - log q)`, gradient through the student.

        Bounded, it is the surrogate `-sum_v sg(p f(d)) log p`, whose gradient is the expectation of the sampled form.

        Args:
            student: (N, V) float32 log-probs with gradient.
            teacher: (N, V) float32 log-probs.
        """
        pull = self.transform((teacher - student).detach())
        return -(student.exp() * pull).sum(-1)

    def weights(self, experience: Experience) -> Tensor:
        return experience.kd_weights

    def teacher_tokens(self, experience: Experience) -> Tensor:
        return experience.kd_weights != 0

    def metrics(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Sums:
        """Distilled tokens only: elsewhere the teacher was not asked."""
        kept = experience.kd_weights != 0
        d, tokens = teacher_gap(policy, experience), kept.sum().float()
        ratio = log_ratio(policy, experience).detach().exp()
        pull = inside(self._pull(d), kept)
        sums: Sums = {
            "teacher/reverse_kl": (inside(-ratio * d, kept).sum(), tokens),
            "teacher/reverse_kl_k3": (inside(ratio * (torch.expm1(d) - d), kept).sum(), tokens),
        }
        advantages = inside(experience.advantages[:, None], experience.response_mask)  # (B, T)
        rl = inside(experience.token_weights[:, None] * advantages.abs(), experience.response_mask).sum()
        kd = self.coef.value(rollout) * (experience.kd_weights * pull.abs()).sum()
        sums["train/kd_to_rl"] = (kd, rl)
        sums["train/sign_conflict"] = ((advantages * pull < 0).sum().float(), tokens)
        return sums


def teacher_gap(policy: PolicyOutput, experience: Experience) -> Tensor:
    """(B, T) `d = teacher_logprobs - logprobs` in nats, detached; zero where the distillation weight is zero."""
    d = experience.teacher_logprobs - policy.logprobs.detach()
    return inside(d, (experience.kd_weights != 0) & experience.response_mask)
