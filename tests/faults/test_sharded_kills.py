"""Sharded saves and SIGKILL at any moment. KDRL_KILLS says how many; `make soak` makes it 50."""

import os
import signal
import time

import pytest
import torch.distributed as dist
from test_shards import check, content

from kdrl_pl.checkpoint import find_checkpoint
from kdrl_pl.shards import save_sharded

pytestmark = [pytest.mark.faults, pytest.mark.distributed]


def save_on_and_on(folder, number):
    """One of two ranks: every name is written twice."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=number, world_size=2)
    mesh, count = dist.init_device_mesh("cpu", (2,)), 0
    while True:
        count += 1
        save_sharded(content(count, mesh), folder / "checkpoints" / f"last-{count // 2:06d}.sharded.ckpt")


def test_kills_at_any_moment_leave_whole_checkpoints(tmp_path, record_property):
    """Red: an index that names files of two saves, a folder that counts as a checkpoint before it is one."""
    kills = int(os.environ.get("KDRL_KILLS", "6"))
    numbers = []
    for attempt in range(kills):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        pids = []
        for number in range(2):
            pid = os.fork()
            if pid == 0:
                try:
                    save_on_and_on(folder, number)
                finally:
                    os._exit(1)
            pids.append(pid)
        started = time.monotonic()
        while not (folder / "checkpoints" / f"last-{attempt % 3:06d}.sharded.ckpt" / "index.json").exists():
            assert time.monotonic() < started + 60, "nothing was saved"
            time.sleep(0.001)
        time.sleep(0.03 * (attempt % 7) / 7)  # within the saves after it
        for pid in pids if attempt % 2 else reversed(pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        newest = find_checkpoint(folder)
        numbers.append(check(newest))
        assert newest.name == f"last-{numbers[-1] // 2:06d}.sharded.ckpt"
    assert max(numbers) > 2  # they were killed at different stages
    record_property("kills, sharded", kills)
