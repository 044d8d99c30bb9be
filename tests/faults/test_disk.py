"""A checkpoint that does not fit on the disk ends the run with a clear message, and harms no earlier one."""

import shutil
from collections import namedtuple
from multiprocessing import get_context

import pytest
import torch
from injectors import small_disk
from tiny_run import fit, make_module

from kdrl_pl.checkpoint import AtomicCheckpointIO, Checkpoints, find_checkpoint, require_space
from kdrl_pl.errors import RunError

pytestmark = pytest.mark.faults


def content(number):
    return {"number": number, "state_dict": {"a": torch.full((500_000,), float(number))}}  # 2 MB


def save_on_small_disks(folder, told):
    """In a process of its own: the limit cannot be raised again."""
    for size in (3_000_000, 1_000_000, 100_000, 1000, 20, 0):  # the file of checksums alone takes 33 bytes, 66 later
        small_disk(size)
        try:
            AtomicCheckpointIO().save_checkpoint(content(2), folder / "checkpoints" / "last-000001.ckpt")
            told.put((size, "saved"))
        except Exception as error:
            told.put((size, f"{type(error).__name__}: {error}"))


def test_a_save_that_hits_the_limit_of_a_file_harms_nothing(tmp_path):
    path = tmp_path / "checkpoints" / "last-000001.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1), path)
    context = get_context("fork")
    told = context.Queue()
    process = context.Process(target=save_on_small_disks, args=(tmp_path, told))
    process.start()
    results = dict(told.get(timeout=60) for _ in range(6))
    process.join(60)
    assert process.exitcode == 0
    assert results.pop(3_000_000) == "saved"
    for result in results.values():
        assert result.startswith(f"RunError: {path} could not be saved: [Errno 27] File too large")
        assert result.endswith("Earlier checkpoints are whole; make room and resume")
    assert find_checkpoint(tmp_path) == path
    assert AtomicCheckpointIO().load_checkpoint(path)["number"] == 2
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.blake2b"]


Usage = namedtuple("Usage", "total used free")


def test_the_free_space_is_looked_at_first(tiny_models, tmp_path, monkeypatch):
    """The disk is full from the third rollout on; the size needed is that of the checkpoint before."""
    real = shutil.disk_usage

    def usage(path):
        newest = find_checkpoint(tmp_path)
        return Usage(10**9, 10**9, newest.stat().st_size - 1) if "000002" in newest.name else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(RunError, match=r"no room for a checkpoint in .*: \d+ MB are free, and .* last-000002.ckpt is"):
        fit(tmp_path, make_module(*tiny_models), max_rollouts=6, checkpoints=Checkpoints(every_n_rollouts=2))
    assert find_checkpoint(tmp_path).name == "last-000002.ckpt"
    monkeypatch.undo()
    module = make_module(*tiny_models)
    fit(tmp_path, module, max_rollouts=6, resume=find_checkpoint(tmp_path))
    assert module.rollouts_done == 6


def test_a_first_checkpoint_has_no_measure(tmp_path):
    require_space(tmp_path)
