"""What a reward is: a callable from completions to a value and a binary verdict per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kdrl_pl.data.prompts import Prompt


class CannotJudge(ValueError):
    """A setting or a row of the data set is wrong, not a completion: no answer can be judged. Says how to mend it."""


@dataclass(frozen=True)
class Completion:
    """One sampled response, as a reward sees it.

    Args:
        prompt: the question it answers.
        text: the response decoded without special tokens, response prefix not included.
        token_ids: the sampled ids, end token included.
        truncated: True when the budget ran out before an end token.
        max_tokens: the budget.
    """

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...] = ()
    truncated: bool = False
    max_tokens: int = 0


@dataclass
class RewardOutput:
    """Rewards of B completions.

    Args:
        values: (B,) floats; None where the reward does not apply to the row (it then leaves a weighted sum).
        correct: (B,) the rule's binary verdict; None per row, or as a whole, when the reward does not judge it.
            It is never derived from `values`.
        answers: (B,) the answer the rule read in each completion, normalised; None per row where it found none. Used by
            maj@k; a reward that reads no answer leaves the whole None.
        metrics: name -> (sum, count) for the log, e.g. {"unparsable": (3, 16)}.
        parts: name -> (B,) values of the rewards this one is made of, for the rollout files.
    """

    values: list[float | None]
    correct: list[bool | None] | None = None
    answers: list[str | None] | None = None
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    parts: dict[str, list[float | None]] = field(default_factory=dict)


@runtime_checkable
class Reward(Protocol):
    """Anything callable as `reward(completions) -> RewardOutput`; rows of one group stand next to each other.

    A reward may also have `setup()`, called once before the first rollout (imports, checks of its settings), and
    `close()`, called once at the end of the run (worker processes, sockets). One whose work is done by other processes
    sets `runs_in_workers = True`: it is then called from a thread, while the teacher scores.
    """

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput: ...


def runs_in_workers(reward: Reward) -> bool:
    """Whether the calling thread only waits, see `Reward`."""
    return getattr(reward, "runs_in_workers", False)
