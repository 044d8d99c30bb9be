"""Terms that are no sum over rows: what one row contributes depends on the other rows of the update.

Rows are cut into micro-batches and dealt to ranks, so such a term cannot be formed where the gradient is. Its gradient
can: before an update the log-probs of all its rows are taken without gradient, the term is differentiated in them, and
the micro-batches back-propagate `sum of slope * logprob`, whose gradient in the weights is the term's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import Objective, PolicyOutput, Sums, Term

AllReduce = Callable[[Tensor], Tensor]  # adds a tensor up over ranks


@dataclass
class Slopes:
    """A term at the log-probs of one update, as far as it concerns the rows of this rank.

    Args:
        slopes: (B, T) derivative of the term in each log-prob, zero outside the response mask.
        value: () this rank's share of the term; the shares add up to it.
        metrics: name -> (sum, count), for the log.
    """

    slopes: Tensor
    value: Tensor
    metrics: Sums = field(default_factory=dict)


class WholeUpdate(Term):
    """A term of all rows of an update at once, given by its derivative in every log-prob.

    Args:
        coef: its coefficient, a number or a schedule over rollouts.
    """

    def slopes(self, logprobs: Tensor, experience: Experience, all_reduce: AllReduce) -> Slopes:
        """Value and derivative of the term.

        Args:
            logprobs: (B, T) float32 nats of the current student, without gradient.
            experience: this rank's rows of one update, whole groups, with `old_logprobs`.
            all_reduce: adds a tensor up over ranks; every rank calls it equally often.
        """
        raise TypeError(f"{type(self).__name__} does not define slopes")

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Tensor:
        """(B, T) of zeros with the gradient of the log-probs; the value is logged by `prepare`."""
        return policy.logprobs - policy.logprobs.detach()

    def weights(self, experience: Experience) -> Tensor:
        if experience.slopes is None:
            raise ValueError(
                f"{type(self).__name__} looks at all rows of an update at once, and these rows have no slopes; call "
                "module.prepare with the rows of the update, then module.loss"
            )
        return experience.slopes


def prepare(
    objective: Objective,
    logprobs: Callable[[], Tensor],
    experience: Experience,
    rollout: int,
    all_reduce: AllReduce,
) -> Sums:
    """Fill in `experience.slopes`, if a term needs them; its loss and metrics come back, for the log.

    Args:
        objective: whose terms are asked, those with a coefficient other than 0.
        logprobs: gives (B, T) log-probs of the current student, without gradient; called only for such a term.
        experience: this rank's rows of one update.
        rollout: number of the rollout, for schedules.
        all_reduce: adds a tensor up over ranks.
    """
    sums: Sums = {}
    for name, term in objective.terms.items():
        coef = term.coef.value(rollout)
        if isinstance(term, WholeUpdate) and coef != 0.0:
            made = term.slopes(logprobs(), experience, all_reduce)
            experience.slopes = made.slopes
            loss = coef * made.value
            sums |= {"train/loss": (loss, loss.new_zeros(())), f"train/{name}_loss": (loss, loss.new_zeros(()))}
            sums |= made.metrics
    return sums
