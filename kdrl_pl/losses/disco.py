"""DisCO: right responses scored above wrong ones, under a bound on the step (arXiv 2505.12366; METHOD §7).

With a score `s` per response, of P groups in all, maximise

    (1/P) sum over groups of [mean of s over right - tau log mean of e^(s/tau) over wrong] - (beta/2) [KL - delta]_+^2

KL = KL(old || current), the mean over the response tokens of the update of `old - logprobs`. A group without a right or
without a wrong response adds nothing to the sum and counts in P.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_pl.advantages import group_sum
from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import PolicyOutput, inside, log_ratio
from kdrl_pl.losses.weights import counts
from kdrl_pl.losses.whole_update import AllReduce, Slopes, WholeUpdate
from kdrl_pl.schedules import Schedule

TEMPERATURES = {"logprob": 10.0, "ratio": 1.0}  # score -> the paper's tau


class DisCO(WholeUpdate):
    """Discriminative constrained optimisation, in the place of the policy gradient: set model.policy_gradient to null.

    Right and wrong are the rule's binary verdict. The wrong responses of a group weigh by the softmax of s / tau: those
    the student finds likeliest are pushed down most. Rewards, advantages and the normaliser play no part in it.

    Args:
        coef: weight of the term, a number or a schedule over rollouts.
        score: s of a response: "logprob", the mean log-prob of its tokens, or "ratio", the mean of their ratios
            current / old.
        tau: temperature of the softmax; null takes the paper's 10 for "logprob" and 1 for "ratio".
        beta: weight of the squared excess of the KL.
        delta: nats per token, KL to the policy that sampled, above which it is punished.

    Raises:
        ValueError: an unknown score, a tau that is not positive, or a negative beta or delta.
    """

    def __init__(
        self,
        coef: Schedule | float = 1.0,
        score: str = "logprob",
        tau: float | None = None,
        beta: float = 1e3,
        delta: float = 1e-4,
    ) -> None:
        super().__init__(coef)
        if score not in TEMPERATURES:
            raise ValueError(f"score is {score!r}; expected {' or '.join(TEMPERATURES)}")
        if tau is not None and not tau > 0:
            raise ValueError(f"tau is {tau}; expected a positive number, or null for the paper's")
        if not (beta >= 0 and delta >= 0):
            raise ValueError(f"beta and delta are {beta} and {delta}; neither may be negative (the paper's: 1e3, 1e-4)")
        self.score, self.tau = score, TEMPERATURES[score] if tau is None else tau
        self.beta, self.delta = beta, delta

    def slopes(self, logprobs: Tensor, experience: Experience, all_reduce: AllReduce) -> Slopes:
        mask, lengths = experience.response_mask, experience.response_lengths
        moved = log_ratio(PolicyOutput(logprobs.double()), experience)  # (B, T) current - old
        groups, _, tokens = all_reduce(counts(lengths, experience.group)).clamp(min=1).unbind()
        kl = all_reduce(-moved.sum()) / tokens  # (), over all ranks
        excess = (kl - self.delta).clamp(min=0)

        of_tokens = moved.exp() if self.score == "ratio" else inside(logprobs.double(), mask)  # (B, T)
        scores = inside(of_tokens, mask).sum(1) / lengths.clamp(min=1)  # (B,)
        gain, pull = self._discriminate(scores, experience)  # (), (B,)

        in_token = moved.exp() if self.score == "ratio" else torch.ones_like(moved)  # length * d s / d logprob
        of_scores = (pull / lengths.clamp(min=1))[:, None] * in_token / groups
        slopes = inside(-of_scores - self.beta * excess / tokens, mask)
        value = -gain / groups + 0.5 * self.beta * excess.square() * lengths.sum() / tokens
        return Slopes(slopes.to(logprobs.dtype), value, {"train/kl_to_old": (-moved.sum(), lengths.sum())})

    def _discriminate(self, scores: Tensor, experience: Experience) -> tuple[Tensor, Tensor]:
        """() sum over groups of what is maximised, and (B,) its derivative in the score of each row."""
        _, index = experience.group.unique(return_inverse=True)
        groups = int(index.max()) + 1
        has_tokens = experience.response_lengths > 0
        right, wrong = experience.correct & has_tokens, ~experience.correct & has_tokens
        of_right, of_wrong = (group_sum(rows.to(scores.dtype), index, groups) for rows in (right, wrong))
        both = (of_right > 0) & (of_wrong > 0)  # (groups,)
        right, wrong = right & both[index], wrong & both[index]

        scaled = torch.where(wrong, scores / self.tau, -torch.inf)
        peak = torch.full_like(of_wrong, -torch.inf).scatter_reduce(0, index, scaled, "amax")
        mass = torch.where(wrong, (scaled - peak[index]).exp(), 0.0)  # (B,)
        in_all = group_sum(mass, index, groups)  # (groups,)
        worst = self.tau * (peak + (in_all / of_wrong).log())
        best = group_sum(inside(scores, right), index, groups) / of_right
        pull = inside(1 / of_right[index], right) - inside(mass / in_all[index], wrong)
        return inside(best - worst, both).sum(), pull
