"""The weighted sum of several rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kdrl_pl.rewards.base import CannotJudge, Completion, Reward, RewardOutput, runs_in_workers


def check_lengths(output: RewardOutput, rows: int, name: str) -> None:
    """Raise ValueError unless values, verdicts and answers have one entry per completion."""
    for kind in ("values", "correct", "answers"):
        found = getattr(output, kind)
        if found is not None and len(found) != rows:
            raise ValueError(f"{name} returned {len(found)} {kind} for {rows} completions")


class WeightedSum:
    """The sum of named rewards times their weights, per completion.

    A reward that does not apply to a row (None) leaves that row's sum; a row to which none applies has no value.
    Metrics are prefixed with the reward's name, and `parts` keeps its unweighted values.

    Args:
        rewards: name -> reward; a null entry is left out, so that an overlay can take one away.
        weights: name -> weight; 1 for names not given.
        correct_from: the name of the reward whose verdict is the sum's; may be left out when exactly one (or none) of
            them judges correctness.

    Raises:
        ValueError: no reward, a bad name, a weight or `correct_from` for a name that is not there, a weight that is not
            finite; in a call, several rewards judge correctness and `correct_from` is not given, or the one named does
            not judge, or a reward returns the wrong number of values.
    """

    def __init__(
        self,
        rewards: dict[str, Reward | None],
        weights: dict[str, float] | None = None,
        correct_from: str | None = None,
    ) -> None:
        self.rewards: dict[str, Reward] = {name: reward for name, reward in rewards.items() if reward is not None}
        self.weights = dict.fromkeys(self.rewards, 1.0) | dict(weights or {})
        self.correct_from = correct_from
        if not self.rewards:
            raise ValueError("WeightedSum got no rewards; name at least one")
        for name in rewards:
            if not name.isidentifier():
                raise ValueError(f"WeightedSum got a reward named {name!r}; names are letters, digits and underscores")
            if name in ("mean", "std", "correct", "errors"):
                raise ValueError(f"WeightedSum got a reward named {name!r}, as a metric of its own is; rename it")
        for name, weight in self.weights.items():
            if name not in rewards:
                raise ValueError(f"WeightedSum got a weight for {name!r}; its rewards are {', '.join(rewards)}")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} is {weight}; expected a finite number")
        if correct_from is not None and correct_from not in self.rewards:
            raise ValueError(f"correct_from is {correct_from!r}; expected one of {', '.join(self.rewards)}")

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        rows = len(completions)
        outputs = {name: reward(completions) for name, reward in self.rewards.items()}
        for name, output in outputs.items():
            check_lengths(output, rows, f"the reward {name!r}")
        values: list[float | None] = []
        for i in range(rows):
            terms = [self.weights[n] * v for n, o in outputs.items() if (v := o.values[i]) is not None]
            values.append(math.fsum(terms) if terms else None)
        judge = self._judge(outputs)
        return RewardOutput(
            values,
            correct=None if judge is None else judge.correct,
            answers=None if judge is None else judge.answers,
            metrics={f"{name}/{key}": v for name, output in outputs.items() for key, v in output.metrics.items()},
            parts=self._parts(outputs),
        )

    def _judge(self, outputs: Mapping[str, RewardOutput]) -> RewardOutput | None:
        """The output whose verdicts and answers are the sum's."""
        judges = [name for name, output in outputs.items() if output.correct is not None]
        if self.correct_from is not None:
            if self.correct_from not in judges:
                raise CannotJudge(
                    f"correct_from is {self.correct_from!r}, which does not judge correctness; those that do:"
                    f" {', '.join(judges) or 'none'}"
                )
            return outputs[self.correct_from]
        if len(judges) > 1:
            raise CannotJudge(
                f"{', '.join(judges)} all judge correctness, and the sum needs one verdict: set correct_from to one of"
                " them"
            )
        return outputs[judges[0]] if judges else None

    @staticmethod
    def _parts(outputs: Mapping[str, RewardOutput]) -> dict[str, list[float | None]]:
        parts = {}
        for name, output in outputs.items():
            parts[name] = list(output.values)
            parts |= {f"{name}/{key}": part for key, part in output.parts.items()}
        return parts

    @property
    def runs_in_workers(self) -> bool:
        """Whether all of them may be called from a thread that only waits."""
        return all(runs_in_workers(reward) for reward in self.rewards.values())

    def setup(self) -> None:
        """Set up every reward."""
        for reward in self.rewards.values():
            getattr(reward, "setup", lambda: None)()

    def close(self) -> None:
        """Close every reward that can be closed; an error of one does not keep the others open."""
        errors = []
        for reward in self.rewards.values():
            try:
                getattr(reward, "close", lambda: None)()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
