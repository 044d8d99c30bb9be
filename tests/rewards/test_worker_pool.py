"""Real processes: a worker that sleeps, dies, or babbles when the job tells it to."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kdrl_pl.rewards.worker_pool import WorkerPool

ROOT = Path(__file__).parents[2]
WORKER = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    time.sleep(job.get("sleep", 0))
    if "die_unless" in job and not os.path.exists(job["die_unless"]):
        open(job["die_unless"], "w").close()
        os._exit(9)
    if job.get("die"):
        os._exit(9)
    print(json.dumps({"value": job["value"], "pid": os.getpid(), **job.get("extra", {})}), flush=True)
"""


@pytest.fixture
def pool(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    pool = WorkerPool([sys.executable, str(script)], workers=2, time_limit=30.0)
    yield pool
    pool.close()


def values(replies):
    return [None if reply is None else reply["value"] for reply in replies]


def gone(pid):
    """True once the process has ended; an orphan may stay a zombie where nobody collects it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.02)
    return False


def test_replies_come_in_the_order_of_the_jobs(pool):
    jobs = [{"value": i, "sleep": 0.2 if i == 0 else 0} for i in range(20)]
    assert values(pool.map(jobs)) == list(range(20))


def test_workers_start_when_needed_and_stay(pool):
    assert pool.pids == []
    (first,) = pool.map([{"value": 1}])
    assert pool.pids == [first["pid"]]  # one job is not worth two workers
    pool.map([{"value": i, "sleep": 0.1} for i in range(8)])
    before = pool.pids
    assert len(before) == 2
    assert {reply["pid"] for reply in pool.map([{"value": i, "sleep": 0.05} for i in range(8)])} == set(before)


def test_a_job_out_of_time_is_killed_and_costs_only_itself(pool):
    pool.map([{"value": 0, "sleep": 0.1}] * 4)
    pool.time_limit = 1.0
    before, started = pool.pids, time.monotonic()
    assert values(pool.map([{"value": 0}, {"value": 1, "sleep": 600}, {"value": 2}, {"value": 3}])) == [0, None, 2, 3]
    assert 1.0 <= time.monotonic() - started < 15
    assert sum(gone(pid) for pid in before if pid not in pool.pids) == 1


@pytest.mark.faults
def test_a_worker_killed_in_the_middle_of_a_job_is_replaced_and_the_job_done(pool):
    pool.map([{"value": 0, "sleep": 0.1}] * 4)
    victim = pool.pids[0]
    killer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
    killer.start()
    replies = pool.map([{"value": i, "sleep": 1.0} for i in range(2)])
    assert values(replies) == [0, 1]
    assert victim not in {reply["pid"] for reply in replies}
    assert gone(victim)


@pytest.mark.faults
def test_a_worker_that_died_between_calls_is_replaced(pool):
    (reply,) = pool.map([{"value": 1}])
    os.kill(reply["pid"], signal.SIGKILL)
    assert values(pool.map([{"value": 2}, {"value": 3}])) == [2, 3]


@pytest.mark.faults
def test_a_stopped_worker_is_out_of_time(pool):
    (reply,) = pool.map([{"value": 1}])
    os.kill(reply["pid"], signal.SIGSTOP)
    pool.time_limit = 0.5
    assert values(pool.map([{"value": 2}])) == [None]
    assert gone(reply["pid"])


def test_a_job_that_kills_its_worker_runs_twice_at_most(pool, tmp_path):
    once = {"value": 1, "die_unless": str(tmp_path / "been_here")}
    assert values(pool.map([{"value": 0}, once, {"value": 2, "die": True}, {"value": 3}])) == [0, 1, None, 3]


def test_a_worker_may_ask_to_be_replaced(pool):
    (first,) = pool.map([{"value": 1, "extra": {"last": True}}])
    (second,) = pool.map([{"value": 2}])
    assert first["pid"] != second["pid"]
    assert gone(first["pid"])


def test_interrupt_leaves_no_reply_behind_for_the_next_call(pool):
    pool.map([{"value": 0}])
    interrupt = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        pool.map([{"value": "stale", "sleep": 20.0}])  # far longer than a busy machine delays the timer
    assert pool.pids == []
    assert values(pool.map([{"value": "fresh"}])) == ["fresh"]


def test_calls_from_two_threads_do_not_mix(pool):
    results = {}

    def call(n):
        results[n] = values(pool.map([{"value": [n, i], "sleep": 0.01} for i in range(20)]))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [[n, i] for i in range(20)] for n in range(2)}


def test_close_ends_the_workers_and_a_later_call_starts_new_ones(pool):
    (before,) = pool.map([{"value": 1}])
    pool.close()
    assert gone(before["pid"])
    (after,) = pool.map([{"value": 2}])
    assert after["pid"] != before["pid"]


def test_workers_end_with_the_pool(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    pool = WorkerPool([sys.executable, str(tmp_path / "worker.py")], workers=1, time_limit=30.0)
    (reply,) = pool.map([{"value": 1}])
    del pool
    assert gone(reply["pid"])


@pytest.mark.faults
@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), 9)"], ids=["exit", "sigkill"])
def test_workers_end_with_the_process(tmp_path, ending):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "owner.py").write_text(
        "import os, sys\n"
        "from kdrl_pl.rewards.worker_pool import WorkerPool\n"
        "pool = WorkerPool([sys.executable, sys.argv[1]], workers=2, time_limit=30.0)\n"
        "pool.map([{'value': 0, 'sleep': 0.1}] * 4)\n"
        "print(*pool.pids, flush=True)\n" + ending
    )
    command = [sys.executable, str(tmp_path / "owner.py"), str(tmp_path / "worker.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert all(gone(pid) for pid in pids)


def test_a_forked_child_that_ends_leaves_its_parents_workers_alone(pool):
    (reply,) = pool.map([{"value": 1}])
    child = os.fork()
    if child == 0:
        try:
            pool.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert pool.map([{"value": 2}])[0]["pid"] == reply["pid"]


def test_a_worker_that_does_not_start_is_an_error_with_its_reason(tmp_path):
    (tmp_path / "sorry.py").write_text(
        f"print('''{json.dumps({'error': 'ImportError: no math_verify'})}''', flush=True)"
    )
    with pytest.raises(RuntimeError, match="does not start: ImportError: no math_verify"):
        WorkerPool([sys.executable, str(tmp_path / "sorry.py")], 1, 30.0).map([1])
    (tmp_path / "mute.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(RuntimeError, match=r"ended 3 times before it was ready \(exit code 3\)"):
        WorkerPool([sys.executable, str(tmp_path / "mute.py")], 2, 30.0).map([1, 2])


def test_a_job_that_does_not_fit_into_a_pipe_is_refused(pool):
    with pytest.raises(ValueError, match="the limit is 60000"):
        pool.map([{"value": "x" * 60_000}])


def test_no_jobs_start_no_workers(pool):
    assert pool.map([]) == []
    assert pool.pids == []
