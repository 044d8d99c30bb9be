"""On-policy distillation from a frozen teacher: the second half of KDRL (arXiv 2506.02208, Eq. 8; METHOD §1-4).

With `d = teacher - logprobs`, detached, of the current student at every update:

    k2          -rho f(d)             exact gradient of KL(student || teacher) at the visited states
    forward_kl  -rho (e^d - 1)        k3 as a loss: the gradient of KL(teacher || student), hence the name
    full        sum_v p_v log(p_v/q_v)  the whole vocabulary, no sampling noise from the token
    top_k       -sum_{v in K} p_v f(d_v) - 1[token not in K] rho f(d), K the student's own likeliest words: in
                expectation the gradient of full, for every K; only what the token adds outside K is noise

The sum over K is not renormalised: that is biased, by less the more of the student's mass K covers, and the teacher's
likeliest words in its place cover what the student does not say. f(d) and the p_v before it carry no gradient other
than p_v's own.

Departures from the paper: the ratio is that of the current update (exact on reused rows too); `d` may be bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.losses.base import PolicyOutput, Sums, Term, cell_log_ratio, inside
from kdrl_pl.losses.competence import Competence
from kdrl_pl.losses.transforms import Transform
from kdrl_pl.losses.weights import KD_MASKS, KD_NORMALISERS, kd_rows
from kdrl_pl.schedules import Schedule

ESTIMATORS = ("k2", "forward_kl", "full", "top_k")
OF_VOCABULARY = ("full", "top_k")
_REFUSED = {
    "k1": "back-propagated, k1 has no teacher in its gradient; use k2, whose gradient is that of the reverse KL",
    "k3": "as a loss k3 has the gradient of the forward KL; write forward_kl if that is meant, k2 for the reverse KL",
}


class Distillation(Term):
    """Reverse KL to the teacher on the student's own tokens.

    Args:
        coef: beta, a number or a schedule over rollouts; the paper's constant is 2e-3 (its best falls from 5e-3).
        estimator: "k2" (exact reverse KL, sampled), "full" (exact reverse KL, whole vocabulary), "top_k" (its sum over
            the student's likeliest words, sampled beyond them) or "forward_kl" (k3 as a loss, for the ablation). "full"
            and "top_k" keep the teacher's hidden states and read both vocabularies a chunk of positions at a time.
        mask: which rows are distilled: "none" = all, "response" = incorrect responses, "group" = groups with no correct
            response (the paper's two), "negative_advantage" = rows with a negative advantage.
        competence: file with the teacher's own results, and the pass rate from which on it may teach a prompt; for weak
            teachers, together with mask "negative_advantage". null trusts the teacher everywhere.
        normaliser: "all" divides by all response tokens, so that beta keeps its meaning; "kept" by the distilled ones.
        transform: bound on d: "none", "clip", "soft_log" or "tanh"; a far teacher needs one.
        transform_bound: nats, for "clip" and "tanh".
        ratio_cap: upper bound on the importance ratio of reused rows; null is off. Not for "full", which has no ratio.
        top_k: K, words of the student that "top_k" sums over; 1 is close to k2, the whole vocabulary is "full".
        rows_without_signal: share of the rows that is distilled in groups whose rewards are all equal; their weights
            rise, so that the expected gradient stays. Such rows go through teacher and update for the distillation
            alone: 0.25 saves most of what it costs more than GRPO, for more variance. In pure distillation, which looks
            at no reward, it is a share of the rows of every group.
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
        competence: Competence | None = None,
        top_k: int = 32,
        rows_without_signal: float = 1.0,
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
            raise ValueError(f"ratio_cap is {ratio_cap}; expected a positive number, and not with estimator full")
        if top_k < 1:
            raise ValueError(f"distillation.top_k is {top_k}; expected the number of words to sum over, at least 1")
        if not 0 < rows_without_signal <= 1:
            raise ValueError(
                f"distillation.rows_without_signal is {rows_without_signal}; expected a share above 0, at most 1"
            )
        self.rows_without_signal = rows_without_signal
        self.estimator, self.mask, self.normaliser, self.top_k = estimator, mask, normaliser, top_k
        self.competence = competence
        self.transform = Transform(transform, transform_bound)
        self.ratio_cap = ratio_cap
        self.reads_vocabulary = self.reads_teacher_vocabulary = estimator in OF_VOCABULARY
        self.sampled = estimator not in OF_VOCABULARY

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Tensor:
        if self.estimator == "full":
            return policy.reading("divergence")
        pull = self._pull(teacher_gap(policy, experience))  # (B, T)
        ratio = cell_log_ratio(policy, experience).exp()  # (B, T)
        if self.ratio_cap is not None:
            ratio = ratio * (self.ratio_cap / ratio.detach()).clamp(max=1.0)
        if self.estimator != "top_k":
            return -ratio * pull
        if policy.importance is not None:
            ratio = policy.importance * ratio
        return policy.reading("divergence") - torch.where(policy.reading("in_top_k") > 0, 0.0, ratio * pull)

    def _pull(self, d: Tensor) -> Tensor:
        return torch.expm1(d) if self.estimator == "forward_kl" else self.transform(d)

    @property
    def asks_about_all(self) -> bool:
        """Whether the teacher is asked about every response token, whatever the rewards are."""
        return self.mask == "none" and self.competence is None and self.rows_without_signal == 1.0

    def rows(self, experience: Experience) -> Tensor:
        """(B,) bool, rows that are distilled: mask and gate."""
        rows = kd_rows(self.mask, experience)
        return rows if self.competence is None else rows & self.competence(experience.uids).to(rows.device)

    def read(self, vocabulary: Vocabulary) -> dict[str, Tensor]:
        if self.estimator == "full":
            return {"divergence": self.divergence(vocabulary.logprobs, vocabulary.teacher)}
        words = min(self.top_k, vocabulary.logprobs.shape[1])
        top = vocabulary.logprobs.detach().topk(words).indices  # (N, K)
        student, teacher = vocabulary.logprobs.gather(1, top), vocabulary.teacher.gather(1, top)
        return {
            "divergence": self.divergence(student, teacher),
            "in_top_k": (top == vocabulary.tokens[:, None]).any(1).to(student.dtype),
            "top_k_mass": student.detach().exp().sum(1),
        }

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N,) divergence of N positions over the given words: `sum_v p (log p - log q)`, gradient through the student.

        Bounded, it is the surrogate `-sum_v sg(p f(d)) log p`, whose gradient is the expectation of the sampled form.

        Args:
            student: (N, V) float32 log-probs with gradient, of all words or of some.
            teacher: (N, V) float32 log-probs of the same words.
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
        ratio = cell_log_ratio(policy, experience).detach().exp()
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
        if "top_k_mass" in policy.readings:
            sums["teacher/top_k_mass"] = (inside(policy.readings["top_k_mass"], kept).sum(), tokens)
        return sums


def teacher_gap(policy: PolicyOutput, experience: Experience) -> Tensor:
    """(B, T) `d = teacher_logprobs - logprobs` in nats, detached; zero where the distillation weight is zero."""
    d = experience.teacher_logprobs - policy.cell_logprobs.detach()
    return inside(d, (experience.kd_weights != 0) & experience.response_mask)
