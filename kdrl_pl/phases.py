"""What a rank is at, for whoever shows it: rollout, reward, teacher, score, update.

Those who do the work announce it in one line; without a listener that costs a look at a variable. Nothing is sent
anywhere and no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

PHASES = ("rollout", "reward", "teacher", "score", "update")


class Listener(Protocol):
    """Who wants to know. Both are called in the middle of the work: note it and return."""

    def begin(self, phase: str) -> None:
        """One of `PHASES` begins; the one before it is over."""

    def advance(self, done: int, total: int | None) -> None:
        """`done` steps of it are over, out of `total` where that is known: token steps, or micro-batches."""


_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """From now on this one is told, in this process; None: nobody."""
    global _listener
    _listener = listener


def begin(phase: str) -> None:
    """Say that a phase begins."""
    if _listener is not None:
        _listener.begin(phase)


def advance(done: int, total: int | None = None) -> None:
    """Say how far it is."""
    if _listener is not None:
        _listener.advance(done, total)


def counted(poll: Callable[[], bool]) -> Callable[[], bool]:
    """`poll`, which an engine asks once per token step, every call of which is announced as one step more."""
    if _listener is None:
        return poll
    steps = 0

    def polled() -> bool:
        nonlocal steps
        steps += 1
        advance(steps)
        return poll()

    return polled
