"""One rank's failure ends the whole job within seconds, and the last thing printed is why."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from test_preemption import TWO, kdrl

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

FAULT = "--rollout.reward.init_args.reward.init_args."


def fails(folder, fault, rank, **environment):
    """Output, exit status, and seconds from the fault to the end of the command; call 3 judges the third rollout."""
    options = [f"{FAULT}{name}={value}" for name, value in {"fault": fault, "call": 3, "rank": rank}.items()]
    process = kdrl(folder, *TWO, *options, f"{FAULT}mark={folder / 'failed'}", **environment)
    output = process.communicate(timeout=120)[0]
    return output, process.returncode, time.time() - float((folder / "failed").read_text())


def processes(folder):
    """Processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def wait_until_gone(folder, seconds):
    until = time.monotonic() + seconds
    while processes(folder):
        assert time.monotonic() < until, f"{processes(folder)} are still there"
        time.sleep(0.1)


def test_an_error_of_rank_1_ends_both_and_is_printed_last(tmp_path):
    output, status, seconds = fails(tmp_path, "raise", 1)
    assert status == 1, output
    assert seconds < 20
    wait_until_gone(tmp_path, 5)
    lines = output.rstrip().splitlines()
    assert lines[-1] == r"ZeroDivisionError: injected into rank 1: \x1b[2J"  # and the terminal keeps its text
    told = lines.index("rank 1 failed:")
    assert re.match(r"kdrl fit: the reward failed for 8 of \d+ rows in the last 4 calls", lines[told + 1])
    assert "Connection closed by peer" not in output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("as_traceback", ["", "1"])
def test_errors_of_any_rank(rank, as_traceback, tmp_path):
    output, status, seconds = fails(tmp_path, "raise", rank, KDRL_TRACEBACK=as_traceback)
    assert (status, seconds < 20) == (1, True), output
    wait_until_gone(tmp_path, 5)
    assert output.rstrip().endswith(rf"ZeroDivisionError: injected into rank {rank}: \x1b[2J")
    assert ("RewardFailure" in output) == bool(as_traceback)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job(tmp_path):
    """Rank 0 hears of it by a broken connection and names it, unless Lightning's watch of children kills it first."""
    output, status, seconds = fails(tmp_path, "exit", 1)
    assert status in (1, -signal.SIGKILL), output
    assert seconds < 20
    if status == 1:
        assert output.rstrip().endswith(f"rank 1 had ended before, with status -{signal.SIGKILL.value}")
    wait_until_gone(tmp_path, 5)


@pytest.mark.slow
def test_when_rank_0_is_killed_the_others_end(tmp_path):
    _, status, _ = fails(tmp_path, "exit", 0)
    assert status == -signal.SIGKILL
    wait_until_gone(tmp_path, 20)
