"""What a modulation is: it changes importance ratio or advantages of single tokens, before the surrogate is clipped."""

from __future__ import annotations

from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import inside


class Modulation:
    """`(rho, A) -> (rho', A')` per token; the surrogate takes both in both of its places.

    Tokens outside `experience.teacher_mask` keep their ratio and advantage.
    """

    def __call__(
        self, log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, experience: Experience
    ) -> tuple[Tensor, Tensor]:
        """(B, T) log-ratio and (B, T) advantages as the surrogate shall see them.

        Args:
            log_ratio: (B, T) nats, `logprobs - old` with gradient, zero outside the response mask.
            advantages: (B, T).
            logprobs: (B, T) nats, of the current student, with gradient; at stop tokens of their cell.
            experience: with `teacher_logprobs` and `teacher_mask`.
        """
        raise TypeError(f"{type(self).__name__} does not define __call__")

    def rows(self, advantages: Tensor) -> Tensor:
        """(B,) bool, rows that can be changed at all, from their advantages (B,): the teacher reads no others."""
        return advantages != 0


def old_gap(log_ratio: Tensor, logprobs: Tensor, experience: Experience) -> Tensor:
    """(B, T) `d_old = teacher_logprobs - old` in nats, detached; zero where the teacher was not asked.

    Old is `logprobs - log_ratio`: at a stop token the cell moved as the token did.
    """
    gap = experience.teacher_logprobs - (logprobs - log_ratio).detach()
    return inside(gap, experience.teacher_mask)
