"""Runs of a study as subprocesses, some at a time; a run that another process does is left to it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from kdrl_pl.study.plan import Run

_PATIENCE = 30.0  # seconds that a run has to finish its rollout and save it when the study is stopped


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    lock: IO[str]
    log: Path


def environment_of_runs(jobs: int, threads: int | None) -> dict[str, str]:
    """What is added to the environment of every run: its threads, one each when several run and nothing is said."""
    count = threads or (1 if jobs > 1 else None)
    return {} if count is None else {"OMP_NUM_THREADS": str(count)}


def execute(
    runs: Sequence[Run],
    root: Path,
    *,
    jobs: int,
    environment: Mapping[str, str],
    started: Callable[[Run], None],
    ended: Callable[[Run, str | None], None],
) -> None:
    """Do all `runs`, `jobs` at a time, whatever becomes of each; when this ends early, its subprocesses are ended too.

    What a run prints is in `log.txt` of its folder. The lock beside it is held by the subprocess as well, so that a run
    whose study was killed is not started a second time while it goes on.

    Args:
        runs: in the order in which they start.
        root: folder of the study.
        jobs: subprocesses at the same time.
        environment: added to that of the subprocesses.
        started: called when a run starts.
        ended: called with a run and None, or why its subprocess did not end well or was not started.
    """
    waiting, children = list(runs), list[_Child]()
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        while waiting or children:
            while waiting and len(children) < jobs:
                run = waiting.pop(0)
                child = _start(run, root, environment)
                if child is None:
                    ended(run, "another process is doing it")
                else:
                    children.append(child)
                    started(run)
            time.sleep(0.05)
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                child.lock.close()
                ended(child.run, _problem(child))
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(children)


def _start(run: Run, root: Path, environment: Mapping[str, str]) -> _Child | None:
    """The subprocess of a run; None when another process holds its lock."""
    folder = run.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    path = folder / "log.txt"
    with path.open("a") as log:
        process = subprocess.Popen(
            run.command(root),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            env={**os.environ, **environment},
        )
    lock.truncate(0)
    print(process.pid, file=lock, flush=True)  # for people
    return _Child(run, process, lock, path)


def _problem(child: _Child) -> str | None:
    status = child.process.returncode
    if status == 0:
        return None
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; log: {child.log}"
    lines = [line.strip() for line in child.log.read_text(errors="replace").splitlines() if line.strip()]
    return f"status {status}: {lines[-1][:300] if lines else 'nothing printed'}; log: {child.log}"


def _stop(children: Sequence[_Child]) -> None:
    """End subprocesses; their runs go on from the last checkpoint next time."""
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, deadline - time.monotonic()))
        child.process.kill()
        child.process.wait()
        child.lock.close()


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
