"""RankWatch: what happens to one rank of a job becomes known to all of them.

Ranks wait for each other in collectives, so a rank that raised would leave the others waiting until the process
group's time-out, and one that alone was told to stop would wait for theirs. The job's key-value store, which torch
keeps for its process group, serves as a notice board that a thread of every rank reads.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from traceback import print_exception
from typing import Any, NoReturn

from lightning.pytorch import Callback

from kdrl_pl import signals
from kdrl_pl.errors import GivenUp

_SIGNAL, _FAILURE = "kdrl_pl/signal", "kdrl_pl/failure"
POLL = 0.1  # seconds between two looks at the board
TOLD = 1.0  # seconds in which the rank that failed can print why, and the others read it
LOST = 10.0  # seconds after which a job whose rank 0 is gone is over


class RankWatch(Callback):
    """The first rank that fails prints its error, and the whole job ends with status 1 a second later.

    The errors of other ranks that follow from it ("connection closed by peer") are not printed, and no one waits for a
    time-out. SIGTERM and SIGINT to one rank reach all, also while its main thread waits for the others. With one
    process it does nothing. Put it before other callbacks, so that it watches while they set up.

    Args:
        report: prints the error of the rank that failed.
    """

    def __init__(self, report: Callable[[BaseException], None] = print_exception) -> None:
        self.report = report
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._store: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.world_size == 1 or self._thread is not None:
            return
        self._over.clear()
        self._store = _board()
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            # The system writes here even while the main thread waits inside a collective and no handler can run.
            signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        arguments = (trainer, ours, theirs)
        self._thread = threading.Thread(target=self._watch, args=arguments, name="rank-watch", daemon=True)
        self._thread.start()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Tell the others, print, end. Nothing of Lightning's own tidying up runs: it could wait for another rank."""
        if trainer.world_size == 1:
            return
        self._stop()
        if isinstance(exception, signals.Preempted | GivenUp):  # all ranks stop at the same place
            return
        mine = str(trainer.global_rank)
        try:
            store = self._store or _board()
            is_first = store.compare_set(_FAILURE, "", mine).decode() == mine
        except RuntimeError:  # rank 0, which keeps the board, is gone
            os._exit(1)
        if is_first:
            if trainer.global_rank:
                print(f"rank {mine} failed:", file=sys.stderr)
            self.report(exception)
            for rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), start=1):
                if process.poll():  # it died without a word, and this error is what came of it
                    print(f"rank {rank} had ended before, with status {process.returncode}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        _leave(trainer)

    def _stop(self) -> None:
        if self._thread is not None:
            self._over.set()
            if threading.current_thread() is threading.main_thread():
                signal.set_wakeup_fd(-1)
            self._thread.join(1)
            self._thread = None

    def _watch(self, trainer: Any, ours: socket.socket, theirs: socket.socket) -> None:
        try:
            while not self._over.is_set():
                if select.select([ours], [], [], POLL)[0]:
                    arrived = [number for number in ours.recv(64) if number in signals.SIGNALS]
                    if arrived:
                        self._store.compare_set(_SIGNAL, "", str(int(arrived[0])))
                if self._store.check([_SIGNAL]):
                    signals.note(int(self._store.get(_SIGNAL)))
                if self._store.check([_FAILURE]):
                    _leave(trainer)
        except RuntimeError:  # rank 0 is gone: over, or killed
            if not self._over.wait(LOST):
                os._exit(1)
        finally:
            ours.close()
            theirs.close()


def _leave(trainer: Any) -> NoReturn:
    """End this process. Rank 0 first, with its children: Lightning kills it when another ends before."""
    time.sleep(3 * TOLD if trainer.global_rank else TOLD)
    launcher = trainer.strategy.launcher
    if hasattr(launcher, "procs"):  # Lightning started the other ranks
        launcher.kill(signal.SIGKILL)
    os._exit(1)


def _board() -> Any:
    """A connection of its own to the store of the process group."""
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    return store.clone()
