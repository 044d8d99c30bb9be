"""GSPO: one importance ratio per response, clipped as a whole (arXiv 2507.18071, Eq. 5-7; METHOD §7).

Departure: the mean over groups and rows is one mean over the rows of an update, the same where groups are of one size.
"""

from __future__ import annotations

from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import PolicyOutput, log_ratio
from kdrl_pl.losses.policy_gradient import PolicyGradient
from kdrl_pl.schedules import Schedule


class GSPO(PolicyGradient):
    """The surrogate `-min(s A, clip(s, 1 - low, 1 + high) A)` of each response, `s = exp(mean over tokens of log rho)`.

    Every token of a row carries the surrogate of its row, and `s` the gradient of all of them; under the weights of
    the normaliser "sequence", 1 / (B |o|), they add up to the paper's mean over responses: its gradient in the log-prob
    of each token is `-s A / (B |o|)` where the row is not clipped. Any other normaliser is refused. The distillation
    term keeps the ratio of each token; under importance_cap a response weighs the mean of its tokens' weights.

    Args:
        coef: weight of the term, a number or a schedule over rollouts.
        clip_low: the ratio of a response is clipped below at 1 - clip_low for negative advantages; the paper's 3e-4.
        clip_high: the ratio of a response is clipped above at 1 + clip_high for positive advantages; the paper's 4e-4.
    """

    only_normaliser = "sequence"

    def __init__(self, coef: Schedule | float = 1.0, clip_low: float = 3e-4, clip_high: float = 4e-4) -> None:
        super().__init__(coef, clip_low, clip_high)

    def ratio_and_advantages(self, policy: PolicyOutput, experience: Experience) -> tuple[Tensor, Tensor]:
        of_tokens = log_ratio(policy, experience)  # (B, T)
        of_row = of_tokens.sum(1, keepdim=True) / experience.response_lengths.clamp(min=1)[:, None]  # (B, 1)
        return of_row.exp().expand_as(of_tokens), experience.advantages[:, None].expand_as(of_tokens)
