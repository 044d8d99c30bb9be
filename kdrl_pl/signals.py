"""SIGTERM and SIGINT as a question that is asked between two tokens, instead of an end in the middle of something."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GAVE_UP = 255  # in place of a signal: this process cannot go on, and all are to stop as for one

_received = 0
_reason = ""


class Preempted(SystemExit):
    """The run gives way to a signal; every rank raises it at the same place.

    Args:
        signum: the signal.
        rank: of this process. The exit status is 128 + signum, as a shell gives it, on rank 0; the others end with 0,
            because Lightning's launcher takes anything else for a failure and kills rank 0 while it is still busy.
    """

    def __init__(self, signum: int, rank: int = 0) -> None:
        super().__init__(0 if rank else 128 + signum)
        self.name = signal.Signals(signum).name


def catch() -> None:
    """From now on SIGTERM and SIGINT are remembered; a second SIGINT ends the process at once.

    Only the main thread can do this; in another one, nothing happens. Whoever had them before gets them back from
    Lightning, which restores all handlers at the end of a run.
    """
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, _remember)


def forget() -> None:
    """As if nothing had arrived."""
    global _received, _reason
    _received, _reason = 0, ""


def received() -> int:
    """The first signal that arrived, here or on another rank; 0 without one."""
    return _received


def note(signum: int) -> None:
    """Another rank got this signal."""
    global _received
    _received = _received or signum


def give_up(why: str) -> None:
    """This process cannot go on: at the next `parallel.give_way` all stop, unless a signal stops them anyway."""
    global _reason
    note(GAVE_UP)
    _reason = _reason or why


def reason() -> str:
    """Why this process gave up; empty if it did not."""
    return _reason


def should_stop() -> bool:
    """Whether a signal arrived; what rollout engines poll."""
    return bool(_received)


def _remember(signum: int, frame: FrameType | None) -> None:
    note(signum)
    if signum == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system's own, which ends a process stuck in a C call too
