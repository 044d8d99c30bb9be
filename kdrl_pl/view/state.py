"""What a display shows of a run: which rollout, which phase and how far, how fast, how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class RunState:
    """Listens to phases and to finished rollouts; a display reads it from a thread of its own.

    Args:
        name: of the run.
        total: rollouts of the whole run; None where the end is not known.
        clock: seconds, only differences matter.
    """

    def __init__(
        self, name: str = "", total: int | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.name, self.total, self.clock = name, total, clock
        self.done = 0  # rollouts, those of earlier parts of a resumed run counted
        self.doing = ""  # what is done instead of a rollout: "validation before training"
        self.phase = ""
        self.over: set[str] = set()  # phases that this rollout has behind it
        self.steps: tuple[int, int | None] = (0, None)  # of the phase: done, out of
        self.metrics: dict[str, float] = {}
        self.correct: list[float] = []  # of the rollouts so far, for the trend
        self._phase_began = self._began = clock()
        self._first: int | None = None  # rollouts that were done when this process began

    # ---- what it hears -----------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """See `phases.Listener`; the updates of one rollout are one phase."""
        if phase != self.phase:
            self.over.add(self.phase)
            self.phase, self._phase_began = phase, self.clock()
        self.steps = (0, None)

    def advance(self, done: int, total: int | None) -> None:
        self.steps = (done, total)

    def start(self, done: int) -> None:
        """Training begins, or goes on, with so many rollouts done."""
        if self._first is None:
            self.done = self._first = done
            self._began = self.clock()

    def evaluate(self, what: str) -> None:
        """A validation begins, or is over ("" then): its phases are none of a rollout's."""
        self.doing, self.phase, self.over = what, "", set()

    def finish(self, done: int, metrics: Mapping[str, float]) -> None:
        """A rollout is over."""
        self.done, self.metrics, self.phase, self.over = done, dict(metrics), "", set()
        if "reward/correct" in metrics:
            self.correct.append(metrics["reward/correct"])

    # ---- what it says ------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds of the phase so far."""
        return self.clock() - self._phase_began

    def seconds(self, phase: str) -> float | None:
        """What the phase took in the last rollout."""
        return self.metrics.get(f"time/{phase}")

    def speed(self, phase: str) -> float | None:
        """Its tokens per second then."""
        return self.metrics.get(f"perf/{phase}_tokens_per_s")

    def share(self) -> float | None:
        """How much of the phase is over, from 0 to 1: by its steps, else by the time it took last; None if unknown."""
        done, total = self.steps
        if total:
            return min(done / total, 1.0)
        last = self.seconds(self.phase)
        return min(self.elapsed() / last, 1.0) if last else None

    def left(self) -> float | None:
        """Seconds until the last rollout is done, at the pace so far, validations counted; None before the first."""
        done_here = self.done - (self._first or 0)
        if not self.total or not done_here:
            return None
        return (self.clock() - self._began) / done_here * max(self.total - self.done, 0)


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> [duration(s) for s in (41, 130, 7322, 200000)]
    ['41 s', '2 min 10 s', '2 h 2 min', '2 d 7 h']
    """
    whole = round(seconds)
    for size, name, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // below} {smaller}"
    return f"{whole} s"
