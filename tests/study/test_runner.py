"""Real subprocesses that are not training."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdrl_pl.study.plan import Run
from kdrl_pl.study.runner import environment_of_runs, execute

START = "import os, sys, time; print('hello', os.environ.get('OMP_NUM_THREADS'), flush=True); "


@dataclass(frozen=True)
class Script(Run):
    """A run that is a Python script."""

    code: str = ""

    def command(self, root):
        return [sys.executable, "-c", START + self.code, str(self.folder(root))]


def script(code, seed=0):
    return Script("near", "kdrl", seed, 1, (), {}, "d", code=code)


def do(runs, root, jobs=1, environment=None):
    """What was told of the runs, in order."""
    told = []
    execute(
        runs,
        root,
        jobs=jobs,
        environment=environment or {},
        started=lambda run: told.append((run.seed, "started")),
        ended=lambda run, problem: told.append((run.seed, problem)),
    )
    return told


def log_of(run, root):
    return (run.folder(root) / "log.txt").read_text()


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_every_run_is_done_whatever_becomes_of_the_others(tmp_path):
    codes = ["pass", "sys.exit('x\\n  no such thing  \\n')", "os.kill(os.getpid(), 9)", "pass"]
    runs = [script(code, seed) for seed, code in enumerate(codes)]
    told = do(runs, tmp_path)
    ends = [what for _, what in told if what != "started"]
    log = tmp_path / "near/kdrl/seed-1-d/log.txt"
    assert [seed for seed, _ in told] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ends[0] is ends[3] is None
    assert ends[1] == f"status 1: no such thing; log: {log}"
    assert ends[2] == f"killed by SIGKILL; log: {tmp_path / 'near/kdrl/seed-2-d/log.txt'}"
    assert log_of(runs[3], tmp_path).startswith("hello")


def test_as_many_at_a_time_as_asked_for(tmp_path):
    code = f"import pathlib; p = pathlib.Path({str(tmp_path)!r}); m = p / f'{{os.getpid()}}.on'; m.touch(); "
    code += "time.sleep(0.3); print('together', len(list(p.glob('*.on')))); m.unlink()"
    runs = [script(code, seed) for seed in range(4)]
    told = do(runs, tmp_path, jobs=2, environment={"OMP_NUM_THREADS": "1"})
    logs = [log_of(run, tmp_path) for run in runs]
    assert all("hello 1\n" in log for log in logs)
    assert [seed for seed, what in told if what == "started"] == [0, 1, 2, 3]
    together = [int(log.split()[-1]) for log in logs]
    assert max(together) == 2


@pytest.mark.parametrize(
    ("jobs", "threads", "expected"),
    [(1, None, {}), (2, None, {"OMP_NUM_THREADS": "1"}), (1, 4, {"OMP_NUM_THREADS": "4"})],
)
def test_threads(jobs, threads, expected):
    assert environment_of_runs(jobs, threads) == expected


STUDY = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_runner import do, script
do([script("time.sleep(60)", 0), script("time.sleep(60)", 1)], Path({root!r}), jobs=1)
"""


def start_study(root):
    """A process that does two runs of a minute, and the process of the first."""
    code = STUDY.format(here=str(Path(__file__).parent), root=str(root))
    study = subprocess.Popen([sys.executable, "-c", code])
    lock = script("").folder(root) / "lock"
    until(lambda: lock.exists() and lock.read_text().endswith("\n"))
    return study, int(lock.read_text())


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.faults
def test_a_study_that_is_told_to_stop_takes_its_runs_along(tmp_path):
    study, child = start_study(tmp_path)
    os.kill(study.pid, signal.SIGTERM)
    assert study.wait(30) == 143
    assert not alive(child)
    assert not script("", 1).folder(tmp_path).exists()


@pytest.mark.faults
def test_a_run_whose_study_was_killed_is_not_done_twice(tmp_path):
    study, child = start_study(tmp_path)
    os.kill(study.pid, signal.SIGKILL)
    study.wait()
    assert alive(child)
    assert do([script("pass", 0), script("pass", 5)], tmp_path) == [
        (0, "another process is doing it"),
        (5, "started"),
        (5, None),
    ]
    os.kill(child, signal.SIGKILL)
    until(lambda: not alive(child))
    assert do([script("pass", 0)], tmp_path) == [(0, "started"), (0, None)]
