"""Sharded checkpoints are whole or absent whenever a rank dies, damaged ones are passed over, and none runs code."""

import json
import os
import pickle
import shutil
import signal
import time
import traceback
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdrl_pl import shards
from kdrl_pl.checkpoint import AtomicCheckpointIO, Checkpoints, find_checkpoint, has_checkpoints, require_space, run_of
from kdrl_pl.errors import RunError
from kdrl_pl.files import checksum
from kdrl_pl.shards import Parts, read_checkpoint, save_sharded, whole

ROWS = 5  # on two ranks three and two


def content(number, mesh=None):
    """A checkpoint in which every value is `number`; sharded where there is a mesh."""
    tensors = {"a": torch.full((ROWS, 3), float(number)), "b": torch.full((1,), float(number))}
    if mesh is not None:
        from torch.distributed.tensor import Shard, distribute_tensor

        tensors = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in tensors.items()}
    return {"state_dict": tensors, "optimizer_states": [{"state": {0: {"exp_avg": tensors["a"]}}}], "number": number}


def check(path):
    """The number of a checkpoint, once all of it is known to belong together."""
    found = whole(read_checkpoint(path))
    assert list(found["state_dict"]) == ["a", "b"] and found["state_dict"]["a"].shape == (ROWS, 3)
    values = [*found["state_dict"].values(), found["optimizer_states"][0]["state"][0]["exp_avg"]]
    assert all(bool(value.eq(found["number"]).all()) for value in values)
    return found["number"]


def on_ranks(folder, work, ranks=2):
    """Runs `work(rank, mesh)` in processes of their own, ends those that wait for one that died; their statuses."""
    store = folder / f"store-{time.monotonic_ns()}"
    pids = []
    for number in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=ranks)
                work(number, dist.init_device_mesh("cpu", (ranks,)))
                dist.barrier()
                status = 0
            except RunError as error:
                (folder / f"error-{number}").write_text(str(error))
                status = 3
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    statuses, killed = {}, False
    while len(statuses) < ranks:
        for pid in pids:
            if pid not in statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = ended[1]
                killed |= os.WIFSIGNALED(ended[1])
        if killed:
            for pid in pids:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[pid] for pid in pids]


def save(folder, number, ranks=2):
    path = folder / "checkpoints" / f"last-{number:06d}.sharded.ckpt"
    assert on_ranks(folder, lambda _, mesh: save_sharded(content(number, mesh), path), ranks) == [0] * ranks
    return path


def dies_at(fatal):
    """This process dies right before its n-th call that makes something durable or deletes something."""
    calls = []
    for name in ("fsync", "replace", "unlink", "mkdir"):
        real = getattr(os, name)

        def dying(*arguments, real=real, **settings):
            calls.append(arguments)
            if len(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **settings)

        setattr(os, name, dying)


@pytest.mark.faults
@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("overwritten", [False, True])
def test_a_kill_between_any_two_steps_of_a_save(victim, overwritten, tmp_path):
    """Exhaustive. Red: an index before the files it names, an old one deleted too early, files left by a kill."""
    folder = tmp_path / "checkpoints"
    for fatal in range(1, 30):
        shutil.rmtree(folder, ignore_errors=True)
        old = save(tmp_path, 1)
        new = old if overwritten else folder / "last-000002.sharded.ckpt"

        def work(number, mesh, fatal=fatal, new=new):
            saved = content(2, mesh)
            if number == victim:
                dies_at(fatal)
            save_sharded(saved, new)

        statuses = on_ranks(tmp_path, work)
        newest = check(find_checkpoint(tmp_path))
        assert newest in (1, 2) and (overwritten or check(old) == 1)
        if not os.WIFSIGNALED(statuses[victim]):
            assert newest == 2
            break
        after = save(tmp_path, 1) if overwritten else new  # what the kill left is no obstacle
        if not overwritten:
            assert on_ranks(tmp_path, lambda _, mesh, new=new: save_sharded(content(2, mesh), new)) == [0, 0]
        assert check(after) == (1 if overwritten else 2)
        index = json.loads((after / "index.json").read_text())
        assert {path.name for path in after.iterdir()} == {"index.json", *index["files"]}
    assert fatal > (7 if victim == 0 else 1)


@pytest.mark.distributed
def test_one_rank_that_cannot_write_fails_all_and_leaves_what_was(tmp_path):
    old = save(tmp_path, 1)

    def work(number, mesh):
        if number == 1:
            torch.save = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        save_sharded(content(2, mesh), old)

    assert [os.waitstatus_to_exitcode(status) for status in on_ranks(tmp_path, work)] == [3, 3]
    for rank in (0, 1):
        said = (tmp_path / f"error-{rank}").read_text()
        assert "could not be saved (rank 1): [Errno 28] No space left on device. Earlier checkpoints are whole" in said
    assert check(old) == 1 and len(list(old.iterdir())) == 4


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 3])
def test_it_is_read_at_another_number_of_ranks(ranks, tmp_path):
    """Rows 0..4 written by two ranks (three and two) as this rank of three (two, two, one) or of one has them."""
    path = tmp_path / "last-000001.sharded.ckpt"
    full = torch.arange(ROWS * 2.0).view(ROWS, 2)

    def write(_, mesh):
        from torch.distributed.tensor import Shard, distribute_tensor

        save_sharded({"state_dict": {"a": distribute_tensor(full, mesh, [Shard(0)])}}, path)

    def read(number, mesh):
        from torch.distributed.tensor import Shard, distribute_tensor

        own = distribute_tensor(torch.zeros_like(full), mesh, [Shard(0)])
        saved = read_checkpoint(path)["state_dict"]["a"]
        assert isinstance(saved, Parts) and [first for first, _ in saved.parts] == [0, 3]
        for source in (saved, full):
            mine = shards.like(source, own)
            rows = {1: [[0, 1, 2, 3, 4]], 3: [[0, 1], [2, 3], [4]]}[ranks][number]
            assert torch.equal(mine.to_local(), full[rows])
            assert torch.equal(mine.full_tensor(), full)
        assert shards.like(saved, torch.zeros(ROWS, 2)).equal(full)  # not sharded here

    assert on_ranks(tmp_path, write) == [0, 0]
    assert on_ranks(tmp_path, read, ranks) == [0] * ranks


@pytest.mark.distributed
def test_more_ranks_than_rows(tmp_path):
    assert check(save(tmp_path, 4, ranks=3)) == 4  # "b" has one row


# ---- damage and attacks, on folders as save_sharded leaves them ------------------------------------------------------


def write(folder, number, rest=None):
    """A sharded checkpoint of two ranks, made without processes."""
    path = folder / "checkpoints" / f"last-{number:06d}.sharded.ckpt"
    path.mkdir(parents=True)
    places = [("state_dict", "a"), ("state_dict", "b"), ("optimizer_states", 0, "state", 0, "exp_avg")]
    tensors = [torch.full((ROWS, 3), float(number)), torch.full((1,), float(number))]
    tensors.append(tensors[0])
    shapes = {place: list(tensor.shape) for place, tensor in zip(places, tensors, strict=True)}
    empty = {"state_dict": {"a": None, "b": None}, "optimizer_states": [{"state": {0: {"exp_avg": None}}}]}
    cuts = [{place: (0, t[:3]) for place, t in zip(places, tensors, strict=True)}]
    cuts.append({place: (3, t[3:]) for place, t in zip(places, tensors, strict=True) if len(t) > 3})
    contents = {f"1-rank-{i:05d}-of-00002.pt": cut for i, cut in enumerate(cuts)}
    contents["1-rest.pt"] = rest or {"sharded": shapes, "checkpoint": {**empty, "number": number}}
    for name, made in contents.items():
        torch.save(made, path / name)
    vouch(path)
    return path


def vouch(path):
    """An index with the checksums of what lies there."""
    files = {file.name: checksum(file) for file in path.glob("*.pt")}
    (path / "index.json").write_text(json.dumps({"number": 1, "files": files}))


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_folder_made_by_hand_is_one(tmp_path):
    path = write(tmp_path, 7)
    assert check(find_checkpoint(tmp_path)) == 7
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["state_dict"]["a"].shape == (ROWS, 3)
    assert run_of(path) == run_of(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda path: flip(path / "1-rank-00001-of-00002.pt"),
            "the content of 1-rank-00001-of-00002.pt does not match",
        ),
        (lambda path: flip(path / "1-rest.pt"), "the content of 1-rest.pt does not match its checksum"),
        (lambda path: (path / "1-rank-00000-of-00002.pt").unlink(), "1-rank-00000-of-00002.pt is missing"),
        (lambda path: (path / "index.json").write_text('{"files": '), "it has no readable index.json"),
        (
            lambda path: (path / "index.json").write_text('{"number": 1, "files": {"../a.pt": "00"}}'),
            "it has no readable index.json",
        ),
        (lambda path: (path / "index.json").write_text("[1]"), "it has no readable index.json"),
    ],
)
def test_damaged_ones_are_passed_over_and_named(damage, reason, tmp_path, caplog):
    write(tmp_path, 9)
    damage(write(tmp_path, 10))
    assert find_checkpoint(tmp_path).name == "last-000009.sharded.ckpt"
    assert f"skipped checkpoint {tmp_path}/checkpoints/last-000010.sharded.ckpt: " in caplog.text
    assert reason in caplog.text
    with pytest.raises(FileNotFoundError, match=r"last-000010.sharded.ckpt is no whole checkpoint: .*give another, or"):
        find_checkpoint(tmp_path / "checkpoints" / "last-000010.sharded.ckpt")


def test_one_that_was_never_finished_is_none(tmp_path):
    unfinished = write(tmp_path, 3)
    (unfinished / "index.json").unlink()
    assert not has_checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no last checkpoint in {tmp_path}$"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"has no index\.json: its save was interrupted"):
        read_checkpoint(unfinished)
    AtomicCheckpointIO().remove_checkpoint(unfinished)
    assert not unfinished.exists()


def test_the_newest_of_both_kinds_is_found(tmp_path):
    write(tmp_path, 10)
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last-000011.ckpt")
    assert find_checkpoint(tmp_path).name == "last-000011.ckpt"
    write(tmp_path, 12)
    assert find_checkpoint(tmp_path).name == "last-000012.sharded.ckpt"


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("where", ["1-rank-00001-of-00002.pt", "1-rest.pt"])
def test_one_that_would_run_code_is_refused(where, tmp_path):
    target, path = tmp_path / "exploded", write(tmp_path, 1)
    torch.save({"sharded": {}, "checkpoint": Bomb(target)}, path / where)
    vouch(path)
    assert find_checkpoint(tmp_path) == path  # its checksums are right
    with pytest.raises(ValueError, match=f"{where} holds more than tensors, numbers and text"):
        read_checkpoint(path)
    assert not target.exists()
    torch.load(path / where, weights_only=False)
    assert target.exists()  # it was a real one


def test_a_pickle_beside_it_is_not_read(tmp_path):
    target, path = tmp_path / "exploded", write(tmp_path, 1)
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(target)))
    assert check(path) == 1 and not target.exists()


@pytest.mark.parametrize("rest", [{"something": 1}, ["sharded"]])
def test_a_folder_of_something_else_is_refused(rest, tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint of kdrl fit or kdrl sft"):
        read_checkpoint(write(tmp_path, 1, rest))


def test_a_part_that_is_lacking_is_named(tmp_path):
    path = write(tmp_path, 1)
    (path / "1-rank-00001-of-00002.pt").unlink()
    vouch(path)
    with pytest.raises(ValueError, match=r"last-000001.sharded.ckpt lacks parts of a"):
        read_checkpoint(path)


Usage = namedtuple("Usage", "total used free")


def test_the_free_space_is_that_of_the_whole_folder(tmp_path, monkeypatch):
    path = write(tmp_path, 1)
    size = sum(file.stat().st_size for file in path.iterdir())
    for free, enough in ((size - 1, False), (size, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(10**9, 10**9, free))
        if enough:
            require_space(tmp_path / "checkpoints")
        else:
            with pytest.raises(RunError, match=r"no room for a checkpoint in .* last-000001.sharded.ckpt is whole"):
                require_space(tmp_path / "checkpoints")


def test_sharded_checkpoints_need_a_sharded_student(tiny_models, tmp_path):
    from tiny_run import fit, make_module

    with pytest.raises(ValueError, match=r"checkpoint.sharded is true, but under SingleDeviceStrategy every rank has"):
        fit(tmp_path, make_module(*tiny_models), checkpoints=Checkpoints(sharded=True))
