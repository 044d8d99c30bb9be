"""A reward that may fail: its failures are counted and valued, until there are too many."""

from __future__ import annotations

import math
import numbers
import threading
import traceback
from collections import deque
from collections.abc import Sequence

from kdrl_pl.errors import RunError
from kdrl_pl.rewards.base import CannotJudge, Completion, Reward, RewardOutput, runs_in_workers
from kdrl_pl.rewards.combine import check_lengths


class RewardFailure(RunError):
    """Too many failures of a reward; the message holds the first one's trace."""


class GuardedReward:
    """Wraps a reward so that an error, a hang or a value that is no number costs rows instead of the run.

    A call that raises, takes too long or returns the wrong number of values fails for all its rows; a value that is
    NaN, infinite or no number fails for its row. Failed rows get `failure_value` and count as incorrect. When their
    share over the last `window` calls exceeds `max_failure_rate`, `RewardFailure` ends the run with the first trace: a
    reward that always fails stops at its first call. KeyboardInterrupt and SystemExit pass.

    With `time_limit` the reward runs in a thread. Python cannot kill a thread: one that takes too long is abandoned,
    the next call starts another, and the run stops when more than `max_abandoned` are still running. Code that may hang
    often belongs into a subprocess, as in MathReward; code that must run in the main thread (signals) takes no limit.

    Metrics: `errors`, the failed rows.

    Args:
        reward: the reward to guard.
        failure_value: the value of a row whose reward failed.
        max_failure_rate: accepted share of failed rows, 0 to 1; 0 stops at the first failure.
        window: over how many of the last calls the share is taken.
        time_limit: wall-clock seconds per call; null for none.
        max_abandoned: how many calls that ran out of time may still be running.

    Raises:
        ValueError: an argument outside its range.
        RewardFailure: in a call, above one of the limits.
    """

    def __init__(
        self,
        reward: Reward,
        failure_value: float = 0.0,
        max_failure_rate: float = 0.5,
        window: int = 20,
        time_limit: float | None = None,
        max_abandoned: int = 3,
    ) -> None:
        if not math.isfinite(failure_value):
            raise ValueError(f"failure_value is {failure_value}; expected a finite number")
        if not 0 <= max_failure_rate <= 1:
            raise ValueError(f"max_failure_rate is {max_failure_rate}; expected 0 to 1")
        if window < 1 or max_abandoned < 0:
            raise ValueError(f"window is {window} and max_abandoned {max_abandoned}; expected at least 1 and 0")
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"time_limit is {time_limit}; expected more than 0 seconds, or null for none")
        self.reward = reward
        self.failure_value = failure_value
        self.max_failure_rate = max_failure_rate
        self.time_limit = time_limit
        self.max_abandoned = max_abandoned
        self._calls: deque[tuple[int, int]] = deque(maxlen=window)  # (failed rows, rows)
        self._first_failure: str | None = None
        self._abandoned: list[threading.Thread] = []

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        rows = len(completions)
        try:
            output = self._run(completions)
            check_lengths(output, rows, "the reward")
        except RewardFailure:
            raise
        except Exception as error:
            self._remember(str(error) if isinstance(error, CannotJudge) else traceback.format_exc())
            output, failed = RewardOutput([self.failure_value] * rows, [False] * rows), set(range(rows))
        else:
            failed = self._check_rows(output, completions)
        self._calls.append((len(failed), rows))
        self._check_rate()
        output.metrics = {**output.metrics, "errors": (float(len(failed)), float(rows))}
        return output

    def _check_rows(self, output: RewardOutput, completions: Sequence[Completion]) -> set[int]:
        """Give rows with a value or verdict that is none the failure value; their numbers."""
        failed = set()
        values, correct = list(output.values), None if output.correct is None else list(output.correct)
        for i, value in enumerate(values):
            verdict = None if correct is None else correct[i]
            number = value is None or (isinstance(value, numbers.Real) and math.isfinite(value))
            if number and (verdict is None or verdict in (True, False)):
                values[i] = None if value is None else float(value)
                continue
            self._remember(
                f"the reward returned value {value!r} and verdict {verdict!r} for row"
                f" {completions[i].prompt.uid!r}; expected a finite number or None, and a bool or None\n"
            )
            failed.add(i)
            values[i] = self.failure_value
            if correct is not None:
                correct[i] = False
        output.values, output.correct = values, correct
        return failed

    def _run(self, completions: Sequence[Completion]) -> RewardOutput:
        if self.time_limit is None:
            return self.reward(completions)
        result: list[RewardOutput] = []
        raised: list[BaseException] = []

        def call() -> None:
            try:
                result.append(self.reward(completions))
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=call, name="reward", daemon=True)  # must not keep Python from ending
        thread.start()
        thread.join(self.time_limit)
        if thread.is_alive():
            self._abandon(thread)
            raise TimeoutError(f"the reward did not return within {self.time_limit} s")
        if raised:
            raise raised[0]
        return result[0]

    def _abandon(self, thread: threading.Thread) -> None:
        self._abandoned = [t for t in self._abandoned if t.is_alive()] + [thread]
        if len(self._abandoned) > self.max_abandoned:
            self._remember(f"the reward did not return within {self.time_limit} s\n")
            raise RewardFailure(
                f"{len(self._abandoned)} calls of the reward exceeded {self.time_limit} s and still run"
                f" (max_abandoned={self.max_abandoned}); mend it, or run it in a subprocess. The first failure:\n"
                f"{self._first_failure}"
            )

    def _remember(self, failure: str) -> None:
        if self._first_failure is None:
            self._first_failure = failure

    def _check_rate(self) -> None:
        failed, rows = (sum(column) for column in zip(*self._calls, strict=True))
        if failed > self.max_failure_rate * rows:
            raise RewardFailure(
                f"the reward failed for {failed} of {rows} rows in the last {len(self._calls)} calls, more than"
                f" max_failure_rate={self.max_failure_rate}; mend the reward, or raise the limit. The first failure:\n"
                f"{self._first_failure}"
            )

    @property
    def runs_in_workers(self) -> bool:
        return runs_in_workers(self.reward)

    def setup(self) -> None:
        """Set up the guarded reward; what is wrong with its settings is no failure to be counted."""
        getattr(self.reward, "setup", lambda: None)()

    def close(self) -> None:
        """Close the guarded reward."""
        getattr(self.reward, "close", lambda: None)()
