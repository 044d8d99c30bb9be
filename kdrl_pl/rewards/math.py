"""Mathematical answers, judged by math-verify in subprocesses that are killed when they take too long."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from kdrl_pl.rewards.base import Completion, RewardOutput
from kdrl_pl.rewards.match import verdicts
from kdrl_pl.rewards.text import last_boxed, reference_answer
from kdrl_pl.rewards.worker_pool import WorkerPool

_SPACING = re.compile(r"\s+|\\(?:left|right)(?![A-Za-z])|\\[,!;]")
_WRAPPERS = [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")]


class MathReward:
    r"""Right when the last `\boxed{...}` equals the reference answer mathematically.

    The comparison is math-verify's, on LaTeX only: `\frac{1}{2}`, `0.5` and `50\%` are one number, sets have no order,
    `x=5` answers `5`. Read more strictly than there: nothing but the last box, whole, counts; an integral, sum,
    product, limit or derivative that the reference lacks is wrong (the problem copied into the box); numbers near zero
    are compared relatively. A box with the reference's very text is right without a worker.

    Known limits: an unevaluated product or power is accepted (`7\times 8` for 56; use NumericMatch where the problem
    is arithmetic), `5\%` answers both 0.05 and 5, a decimal needs six digits after the point (`0.333333` for 1/3), and
    a word is read as a product of letters (`AB` answers `BA`; use ExactMatch for words and choices).

    Each answer has a hard limit of wall-clock time and memory; a worker that exceeds the time is killed, one that has
    grown large is replaced. A comparison that does not fit into memory fails: the answer is wrong.

    Metrics: `unparsable`, rows without a finished box or with a box that cannot be read; `timeout`, rows that got no
    verdict in time, or whose worker died twice; `reference_unparsable`, rows whose reference answer math-verify cannot
    read, which only the very same text answers. Rows in the first two are wrong.

    Args:
        workers: subprocesses per rank; they start at the first call and stay.
        time_limit: wall-clock seconds per answer. One answer usually takes a few milliseconds.
        memory_limit: GiB of address space per worker (enforced on Linux).
        max_answer_chars: a longer box is unparsable, at most 2,000.
        answer_marker: the reference is what follows this text in the answer column, e.g. `####` for GSM8K.
        correct: the value of a right answer.
        wrong: the value of a wrong answer.

    Raises:
        ValueError: an argument outside its range; in a call, a row without reference answer.
        RuntimeError: the workers do not start.
    """

    runs_in_workers = True

    def __init__(
        self,
        workers: int = 2,
        time_limit: float = 5.0,
        memory_limit: float = 1.0,
        max_answer_chars: int = 1000,
        answer_marker: str | None = None,
        correct: float = 1.0,
        wrong: float = 0.0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; expected at least 1")
        if not (time_limit > 0 and memory_limit >= 0.25):
            raise ValueError(
                f"time_limit is {time_limit} s and memory_limit is {memory_limit} GiB; expected more than 0 s and at"
                " least 0.25 GiB"
            )
        if not 1 <= max_answer_chars <= 2000:
            raise ValueError(f"max_answer_chars is {max_answer_chars}; expected 1 to 2000")
        self.workers = workers
        self.time_limit = time_limit
        self.memory_limit = memory_limit
        self.max_answer_chars = max_answer_chars
        self.answer_marker = answer_marker
        self.correct = correct
        self.wrong = wrong
        self._pool: WorkerPool | None = None

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        references = [_unwrap(reference_answer(c, self.answer_marker)) for c in completions]
        answers = [_unwrap(box) if (box := last_boxed(c.text)) is not None else "" for c in completions]
        pairs = list(zip(references, answers, strict=True))
        judged = self._judge(pairs)
        statuses = [judged[pair][0] for pair in pairs]
        # Right answers vote as one, however they are written.
        voted = [
            reference if status == "correct" else None if status == "unparsable" else _SPACING.sub("", answer)
            for status, (reference, answer) in zip(statuses, pairs, strict=True)
        ]
        output = verdicts(statuses, voted, self.correct, self.wrong)
        rows = float(len(pairs))
        output.metrics["timeout"] = (float(statuses.count("lost")), rows)
        output.metrics["reference_unparsable"] = (float(sum(not judged[pair][1] for pair in pairs)), rows)
        return output

    def _judge(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, bool]]:
        """Status, and whether the reference can be read, of every distinct pair (reference, answer)."""
        judged, jobs = {}, []
        for pair in dict.fromkeys(pairs):
            reference, answer = pair
            if not answer or len(answer) > self.max_answer_chars:
                judged[pair] = ("unparsable", True)
            elif answer == reference:
                judged[pair] = ("correct", True)
            elif len(reference) > self.max_answer_chars:
                judged[pair] = ("wrong", False)
            else:
                jobs.append(pair)
        replies = self._workers().map([{"reference": r, "answer": a} for r, a in jobs]) if jobs else []
        for pair, reply in zip(jobs, replies, strict=True):
            status = "lost" if reply is None else reply["status"]
            judged[pair] = (status, status == "lost" or reply["reference_read"])
        return judged

    def _workers(self) -> WorkerPool:
        if self._pool is None:
            worker = str(Path(__file__).with_name("math_worker.py"))
            # -P: the folder of the script holds a module named `math`, the working folder whatever it holds.
            command = [sys.executable, "-P", worker]
            command += ["--memory-limit", str(self.memory_limit), "--time-limit", str(self.time_limit)]
            # sympy's order of symbols follows the hash seed; a verdict must not change from run to run.
            self._pool = WorkerPool(command, self.workers, self.time_limit, {**os.environ, "PYTHONHASHSEED": "0"})
        return self._pool

    def close(self) -> None:
        """End the workers; a later call starts new ones."""
        if self._pool is not None:
            self._pool.close()


def _unwrap(text: str) -> str:
    """An answer without box, math delimiters and a final full stop."""
    text = (last_boxed(text) or text).strip()
    text = text.removesuffix(".").rstrip()
    for left, right in _WRAPPERS:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
            return text[len(left) : -len(right)].strip()
    return text
