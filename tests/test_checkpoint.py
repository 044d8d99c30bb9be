"""Checkpoints are whole or absent whenever the process dies, damaged ones are passed over, and none runs code."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_run import fit, make_data, make_module, metrics_rows

from kdrl_pl.checkpoint import AtomicCheckpointIO, Checkpoints, find_checkpoint
from kdrl_pl.export import export_checkpoint
from kdrl_pl.module import KDRLModule


def content(number):
    """A checkpoint of 4 MB in which every value is `number`."""
    return {
        "number": number,
        "state_dict": {"a": torch.full((700_000,), float(number)), "b": torch.full((300_000,), float(number))},
    }


def check(path):
    """The number of a checkpoint, once all of it is known to belong together."""
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert all(bool(value.eq(loaded["number"]).all()) for value in loaded["state_dict"].values())
    return loaded["number"]


def in_child(work):
    """Runs `work` in a process of its own and returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def save_on_and_on(folder):
    """What the end of a run does: a new `last`, the older one removed; and the same name once more."""
    io, number = AtomicCheckpointIO(), 0
    while True:
        number += 1
        path = folder / f"last-{number // 2:06d}.ckpt"  # every name is written twice
        io.save_checkpoint(content(number), path)
        for older in folder.glob("last-*.ckpt"):
            if older != path:
                io.remove_checkpoint(older)


@pytest.mark.faults
def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path, record_property):
    """KDRL_KILLS says how many kills; `make soak` makes it 50."""
    kills = int(os.environ.get("KDRL_KILLS", "12"))
    started = time.monotonic()
    for number in range(4):
        AtomicCheckpointIO().save_checkpoint(content(number), tmp_path / "measure" / "a.ckpt")
    cycle = (time.monotonic() - started) / 4
    for attempt in range(kills):
        folder = tmp_path / str(attempt) / "checkpoints"
        folder.mkdir(parents=True)
        pid = in_child(lambda folder=folder: save_on_and_on(folder))
        while not list(folder.glob("*.ckpt")):
            time.sleep(0.001)
        time.sleep(cycle * (1 + attempt % 12 / 6))  # at all stages of the second to the fourth save
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        present = sorted(folder.glob("*.ckpt"))
        assert 1 <= len(present) <= 2
        assert find_checkpoint(tmp_path / str(attempt)) == present[-1]
        assert all(check(path) > 0 for path in present)
    record_property("kills, single file", kills)


@pytest.mark.faults
@pytest.mark.parametrize("overwritten", [False, True])
def test_a_kill_between_any_two_steps_of_a_save(overwritten, tmp_path):
    """Exhaustive: the process dies right before the n-th call that makes something durable."""
    folder = tmp_path / "checkpoints"
    for fatal in range(1, 20):
        shutil.rmtree(folder, ignore_errors=True)
        AtomicCheckpointIO().save_checkpoint(content(1), folder / "last-000001.ckpt")

        def save(fatal=fatal):
            calls = []
            for name in ("fsync", "replace"):
                real = getattr(os, name)

                def dying(*arguments, real=real):
                    calls.append(arguments)
                    if len(calls) == fatal:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments)

                setattr(os, name, dying)  # in this child only
            AtomicCheckpointIO().save_checkpoint(content(2), folder / f"last-00000{1 if overwritten else 2}.ckpt")

        status = os.waitpid(in_child(save), 0)[1]
        numbers = [check(path) for path in sorted(folder.glob("*.ckpt"))]
        assert numbers in ([[1], [2]] if overwritten else [[1], [1, 2]])
        assert check(find_checkpoint(tmp_path)) == numbers[-1]
        AtomicCheckpointIO().save_checkpoint(
            content(3), folder / "last-000001.ckpt"
        )  # what the kill left is no obstacle
        assert check(folder / "last-000001.ckpt") == 3
        if not os.WIFSIGNALED(status):
            break
    assert fatal == 7  # six durable steps: checksums and checkpoint, each written, renamed, and the folder


def save(folder, *numbers):
    for number in numbers:
        AtomicCheckpointIO().save_checkpoint(content(number), folder / "checkpoints" / f"last-{number:06d}.ckpt")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def lose_checksum(path):
    path.with_name(path.name + ".blake2b").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(flip, "does not match its checksum"), (cut, "does not match"), (lose_checksum, "its checksum file is missing")],
)
def test_damaged_checkpoints_are_passed_over_and_named(damage, reason, tmp_path, caplog):
    save(tmp_path, 9, 10, 11)
    damage(tmp_path / "checkpoints" / "last-000011.ckpt")
    assert find_checkpoint(tmp_path).name == "last-000010.ckpt"
    assert f"skipped checkpoint {tmp_path}/checkpoints/last-000011.ckpt: " in caplog.text
    assert reason in caplog.text
    for name in ("last-000009.ckpt", "last-000010.ckpt"):
        damage(tmp_path / "checkpoints" / name)
    with pytest.raises(FileNotFoundError, match=r"no last checkpoint in .*; 3 damaged ones were skipped"):
        find_checkpoint(tmp_path)


def test_the_newest_is_found_by_rollouts_and_best_by_name(tmp_path):
    save(tmp_path, 999_999, 1_000_000)  # one digit more
    AtomicCheckpointIO().save_checkpoint(content(5), tmp_path / "checkpoints" / "best-1000000.ckpt")
    assert find_checkpoint(tmp_path).name == "last-1000000.ckpt"
    assert find_checkpoint(tmp_path, "best").name == "best-1000000.ckpt"
    one = tmp_path / "checkpoints" / "last-999999.ckpt"
    assert find_checkpoint(one) == one
    with pytest.raises(FileNotFoundError, match=f"no run folder or checkpoint at {tmp_path}/nowhere"):
        find_checkpoint(tmp_path / "nowhere", "best")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no best checkpoint in {tmp_path}/empty$"):
        find_checkpoint(tmp_path / "empty", "best")


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_checkpoint_that_would_run_code_is_refused(tiny_models, tmp_path):
    target, path = tmp_path / "exploded", tmp_path / "run" / "checkpoints" / "last-000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "kdrl": Bomb(target)}, path)
    assert find_checkpoint(tmp_path / "run") == path  # its checksum is right
    with pytest.raises(ValueError, match=r"last-000001.ckpt holds more than tensors, numbers and text"):
        fit(tmp_path / "run", make_module(*tiny_models), resume=path)
    with pytest.raises(ValueError, match=r"last-000001.ckpt holds more than tensors, numbers and text"):
        export_checkpoint(path, tiny_models[0], tmp_path / "out")
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # it was a real one


def test_storage_options_are_refused(tmp_path):
    with pytest.raises(TypeError, match="this CheckpointIO writes local files"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})


def test_a_run_keeps_the_last_and_the_best(tiny_models, tmp_path):
    fit(tmp_path, make_module(*tiny_models), make_data(), max_rollouts=5, val_check_interval=1)
    scores = [row["val/avg_at_k"] for row in metrics_rows(tmp_path) if "validation" in row]
    best = scores.index(max(scores)) + 1  # the first of equals
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    files = [f"best-00000{best}.ckpt", "last-000005.ckpt"]
    assert names == sorted([*files, *(f"{name}.blake2b" for name in files), "best.json"])
    written = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert written == {"file": files[0], "val/avg_at_k": pytest.approx(max(scores))}
    loaded = [torch.load(tmp_path / "checkpoints" / name, weights_only=True) for name in files]
    assert [checkpoint["kdrl"]["rollouts_done"] for checkpoint in loaded] == [best, 5]


def test_the_best_can_be_the_smallest(tiny_models, tmp_path):
    keeper = Checkpoints(monitor="val/val/kl_teacher", mode="min")
    fit(tmp_path, make_module(*tiny_models), max_rollouts=4, val_check_interval=1, checkpoints=keeper)
    kl = [row["val/val/kl_teacher"] for row in metrics_rows(tmp_path) if "validation" in row]
    assert keeper.best == pytest.approx(min(kl))


def test_a_metric_that_no_validation_has_stops_the_run_before_it_trains(tiny_models, tmp_path):
    # Red: a misspelt name: the run ends without a best checkpoint, and nothing was said.
    module, keeper = make_module(*tiny_models), Checkpoints(monitor="val/accuracy")
    message = r"checkpoint.monitor is 'val/accuracy', which no validation has; it has val/avg_at_k, val/val/acc"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, max_rollouts=2, checkpoints=keeper)
    assert module.rollouts_done == 0


class NaNAtFirst(KDRLModule):
    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("val/odd", float(self.rollouts_done) if self.rollouts_done > 1 else math.nan, batch_size=1)


def test_no_number_is_never_the_best(tiny_models, tmp_path):
    # Red: a first NaN, than which nothing is larger.
    keeper = Checkpoints(monitor="val/odd")
    fit(tmp_path, make_module(*tiny_models, NaNAtFirst), max_rollouts=3, val_check_interval=1, checkpoints=keeper)
    assert keeper.best == 3
    assert find_checkpoint(tmp_path, "best").name == "best-000003.ckpt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_rollouts": 0}, r"checkpoint.every_n_rollouts is 0; expected at least 1"),
        ({"mode": "least"}, r"checkpoint.mode is 'least'; expected max or min"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**settings)
