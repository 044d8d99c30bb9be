"""Checkpoints: whole or absent on disk, named after the rollouts they hold, last and best.

A checkpoint holds no experience: one asked for in the middle of a rollout is the boundary before it.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from kdrl_pl import shards
from kdrl_pl.boundary import rewind_loops
from kdrl_pl.errors import RunError
from kdrl_pl.files import checksum, replacing, write_json_atomic
from kdrl_pl.plain_tensors import only_plain

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames; a file of checksums stands beside it.

    Lightning's own write can tear when the temporary folder is another file system, and does not flush.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save, or leave everything as it was.

        Raises:
            RunError: it could not be written (full disk, quota, limit on the size of files).
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote file systems; this CheckpointIO writes local files")
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as file:
                torch.save(checkpoint, file)
                file.flush()
                # Named before the rename, beside the old file's: whichever of the two a kill leaves is vouched for.
                checksums = "\n".join([checksum(Path(file.name)), *_checksums(target)])
                with replacing(_checksum_path(target)) as text:
                    text.write(checksums.encode())
        except (OSError, RuntimeError) as error:  # torch hides the system's error behind one of its own
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise RunError(
                f"{target} could not be saved: {cause}. Earlier checkpoints are whole; make room and resume"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Plain tensors and numbers only: a checkpoint cannot run code. A sharded one is put together.

        Raises:
            ValueError: it holds anything else.
        """
        if shards.is_sharded(Path(path)):
            return shards.whole(shards.read_checkpoint(path))
        with only_plain(path):
            where: Any = map_location or "cpu"
            return super().load_checkpoint(path, map_location=where, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        if Path(path).is_dir():
            return shards.remove(Path(path))
        Path(path).unlink(missing_ok=True)
        _checksum_path(Path(path)).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Keeps the last checkpoint and the best one by a validation metric.

    They lie in the run folder as `checkpoints/last-000120.ckpt` and `checkpoints/best-000100.ckpt`; the number is that
    of the rollouts done (steps in kdrl sft). A new one is complete before the old one is deleted.

    Args:
        every_n_rollouts: rollouts (steps in kdrl sft) between two saves of the last; the end of a run is always saved.
        monitor: validation metric of the best.
        mode: "max" or "min": which direction of it is better.
        sharded: every rank writes its own part, into a folder `last-000120.sharded.ckpt/` on a disk that all share: for
            models of which rank 0 could not hold the whole, or slowly; needs FSDP2. False writes a single file. Both
            can be resumed at any number of ranks, and under another strategy.
    """

    def __init__(
        self,
        every_n_rollouts: int = 10,
        monitor: str = "val/avg_at_k",
        mode: str = "max",
        sharded: bool = False,
    ) -> None:
        if every_n_rollouts < 1:
            raise ValueError(f"checkpoint.every_n_rollouts is {every_n_rollouts}; expected at least 1")
        if mode not in ("max", "min"):
            raise ValueError(f"checkpoint.mode is {mode!r}; expected max or min")
        self.every_n_rollouts, self.monitor, self.mode, self.sharded = every_n_rollouts, monitor, mode, sharded
        self.best: float | None = None
        self.folder: Path | None = None
        self._validated = 0  # rollouts done at the last validation
        self._validation_is_due = False  # the run was stopped between a rollout and the validation after it

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.sharded and not isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"checkpoint.sharded is true, but under {type(trainer.strategy).__name__} every rank has the whole "
                "student; set it to false, or shard the student with --config configs/trainer/fsdp2.yaml"
            )
        self.folder = Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Do the validation that the stopped run did not come to."""
        if self._validation_is_due:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.iterations_done % self.every_n_rollouts == 0:
            self._save(trainer, pl_module, "last")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the best.

        Raises:
            ValueError: the validation, that before training for one, does not have the metric.
        """
        if trainer.state.fn != "fit":
            return
        value = float(self._monitored(trainer.callback_metrics))
        if trainer.sanity_checking:
            return
        self._validated, self._validation_is_due = pl_module.iterations_done, False
        if math.isnan(value):
            return  # nothing would ever be better
        if self.best is None or (value > self.best if self.mode == "max" else value < self.best):
            self.best = value
            self._save(trainer, pl_module, "best")

    def _monitored(self, metrics: Mapping[str, Any]) -> Any:
        if self.monitor not in metrics:
            found = ", ".join(sorted(name for name in metrics if name.startswith("val/")))
            raise ValueError(f"checkpoint.monitor is {self.monitor!r}, which no validation has; it has {found}")
        return metrics[self.monitor]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer, pl_module, "last")

    def save_last(self, trainer: Any, pl_module: Any) -> Path:
        """Save now, and return the file; every rank calls it."""
        return self._save(trainer, pl_module, "last")

    def _save(self, trainer: Any, pl_module: Any, kind: str) -> Path:
        suffix = shards.SUFFIX if self.sharded else ".ckpt"
        path = self.folder / f"{kind}-{pl_module.iterations_done:06d}{suffix}"
        if trainer.is_global_zero:
            require_space(self.folder)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for older in self.folder.glob(f"{kind}-*.ckpt"):
                if older != path:
                    trainer.strategy.checkpoint_io.remove_checkpoint(older)
            if kind == "best":
                write_json_atomic(self.folder / "best.json", {"file": path.name, self.monitor: self.best})
        return path

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["validation_is_due"] = self._validation_is_due or self._is_before_validation(trainer, pl_module)
        rewind_loops(checkpoint["loops"], pl_module.iterations_done, trainer.num_training_batches)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._validation_is_due = checkpoint["validation_is_due"]

    def _is_before_validation(self, trainer: Any, pl_module: Any) -> bool:
        """Whether a rollout is done, the next not begun, and the validation between them not done."""
        done, loop = pl_module.iterations_done, trainer.fit_loop.epoch_loop
        if not 0 < done == loop.batch_progress.total.ready or done == self._validated:
            return False
        return loop._should_check_val_fx(trainer.fit_loop._data_fetcher)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def require_space(folder: Path) -> None:
    """Check, before anything is touched, that a checkpoint of the size of the newest one fits on the disk.

    Raises:
        RunError: it does not.
    """
    files = sorted(_present(folder), key=lambda path: path.stat().st_mtime)
    if not files:
        return
    newest, free = files[-1], shutil.disk_usage(folder).free
    size = shards.size(newest) if newest.is_dir() else newest.stat().st_size
    if free < size:
        raise RunError(
            f"no room for a checkpoint in {folder}: {free / 1e6:.0f} MB are free, and the last one took "
            f"{size / 1e6:.0f} MB. {newest.name} is whole; make room and resume from it"
        )


def find_checkpoint(run: str | Path, kind: str = "last") -> Path:
    """The newest checkpoint of a run folder that verifies against its checksums.

    Args:
        run: a run folder (or a checkpoint, file or folder, which is verified and returned).
        kind: "last" (the newest of all) or "best".

    Raises:
        FileNotFoundError: there is none; says what was skipped and why.
    """
    run = Path(run)
    if not run.exists():
        raise FileNotFoundError(f"no run folder or checkpoint at {run} (looked in {Path.cwd()})")
    is_one = run.is_file() or shards.is_sharded(run)
    candidates = [run]
    if not is_one:
        found = _present(run / "checkpoints", "best-" if kind == "best" else "")
        candidates = sorted(found, key=lambda p: (_rollouts(p), p.name), reverse=True)
    for path in candidates:
        if problem := _problem(path):
            log.warning("skipped checkpoint %s: %s", path, problem)
        else:
            return path
    if is_one:
        raise FileNotFoundError(f"{run} is no whole checkpoint: {_problem(run)}; give another, or the run folder")
    skipped = f"; {len(candidates)} damaged ones were skipped" if candidates else ""
    raise FileNotFoundError(f"no {kind} checkpoint in {run}{skipped}")


def run_of(path: Path) -> Path:
    """The run folder of a path that is one, or a checkpoint of one."""
    return path.absolute().parent.parent if path.is_file() or shards.is_sharded(path) else path


def has_checkpoints(run: Path) -> bool:
    """False of a run that was killed before its first checkpoint was whole."""
    return bool(_present(run / "checkpoints"))


def _present(folder: Path, kind: str = "") -> list[Path]:
    """Checkpoints in a folder, without sharded ones that were never finished."""
    return [path for path in folder.glob(f"{kind}*.ckpt") if path.is_file() or (path / shards.INDEX).is_file()]


def _rollouts(path: Path) -> int:
    match = re.search(r"-(\d+)(\.sharded)?\.ckpt$", path.name)
    return int(match[1]) if match else -1


def _problem(path: Path) -> str | None:
    if path.is_dir():
        return shards.problem(path)
    known = _checksums(path)
    if not known:
        return "its checksum file is missing"
    return None if checksum(path) in known else "its content does not match its checksum"


def _checksums(path: Path) -> list[str]:
    """Those of the checkpoints that may stand under this name: the newest, and older ones it replaces."""
    file = _checksum_path(path)
    return file.read_text().split() if file.is_file() else []


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".blake2b")
