"""Sharded checkpoints: a folder to which every rank writes its own part of weights and optimizer state.

    last-000120.sharded.ckpt/
        3-rank-00000-of-00002.pt    place in the checkpoint -> (first row, rows): this rank's part of the tensors
        3-rank-00001-of-00002.pt
        3-rest.pt                   everything else, and the shapes of those tensors
        index.json                  names the files of save 3, with their checksums; written last

The folder is a checkpoint from the moment `index.json` stands in it, and while it stands it names a whole one: a second
save under the same name writes files with the next number, replaces the index, which is one rename, and then deletes
the files that are named no more. Parts can be read at any number of ranks, also one.

torch.distributed.checkpoint is not used: its `.metadata` is a pickle, which could run code. Here files are read as
plain tensors (`plain_tensors`) and JSON only. Its `get_optimizer_state_dict` also makes the state that an optimizer has
not yet by a step of its own, after which a resumed run is not bit-equal.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_pl.errors import RunError
from kdrl_pl.files import checksum, replacing, sync_folder
from kdrl_pl.parallel import rank, world_size
from kdrl_pl.plain_tensors import load_plain

INDEX, SUFFIX = "index.json", ".sharded.ckpt"
Result = TypeVar("Result")


@dataclass
class Parts:
    """A tensor of a checkpoint whose rows lie in several files, on the disk until they are asked for.

    Args:
        shape: of the whole tensor.
        parts: (number of the first row, rows) in their order.
    """

    shape: torch.Size
    parts: list[tuple[int, Tensor]]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (excluded)."""
        inside = [part[max(start - first, 0) : max(stop - first, 0)] for first, part in self.parts]
        return torch.cat(inside)


def is_sharded(path: Path) -> bool:
    """Whether this is a sharded checkpoint, whole or not, by its name or its content."""
    return path.name.endswith(SUFFIX) or (path / INDEX).is_file()


def read_checkpoint(path: str | Path) -> Any:
    """What a checkpoint holds, tensors left on the disk until they are used, of a sharded one as `Parts`.

    Args:
        path: a single file or the folder of a sharded one.

    Raises:
        ValueError: it is damaged, or holds more than plain values.
    """
    path = Path(path)
    if not is_sharded(path):
        return load_plain(path, mmap=True)
    index = _index(path)
    if index is None:
        raise ValueError(f"{path} has no {INDEX}: its save was interrupted; give another checkpoint, or the run folder")
    *parts, rest = [load_plain(path / name, mmap=True) for name in sorted(index["files"])]  # "rank" < "rest"
    if not isinstance(rest, dict) or rest.keys() != {"sharded", "checkpoint"}:
        raise ValueError(f"{path} is no checkpoint of kdrl fit or kdrl sft")

    def joined(place: tuple, leaf: Any) -> Any:
        if place not in rest["sharded"]:
            return leaf
        found = sorted((part[place] for part in parts if place in part), key=lambda part: part[0])
        shape = torch.Size(rest["sharded"][place])
        if sum(len(rows) for _, rows in found) != shape[0]:
            raise ValueError(f"{path} lacks parts of {place[-1]}")
        return Parts(shape, found)

    return map_tree(rest["checkpoint"], joined)


def whole(tree: Any) -> Any:
    """The same with every `Parts` put together."""
    return map_tree(tree, lambda _, leaf: leaf.rows(0, leaf.shape[0]) if isinstance(leaf, Parts) else leaf)


def gathered(tree: Any) -> Any:
    """The same with every sharded tensor whole and in host memory, on rank 0 (None elsewhere); every rank calls it."""

    def full(place: tuple, leaf: Any) -> Any:
        if not is_dtensor(leaf):
            return leaf
        tensor = leaf.full_tensor().detach()  # collective
        return tensor.to("cpu", copy=True) if rank() == 0 else None

    return map_tree(tree, full)


def like(saved: Any, own: Any) -> Any:
    """A tensor of a checkpoint as `own` lies: this rank's rows where that is sharded, else whole.

    Args:
        saved: tensor or `Parts`; anything else is returned.
        own: the tensor or parameter of this run that it is for.
    """
    if not isinstance(saved, Tensor | Parts) or not is_dtensor(own) or saved.shape != own.shape:
        return whole(saved)
    from torch.distributed.tensor import DTensor

    first, count = first_row(own), len(own.to_local())
    rows = saved.rows(first, first + count) if isinstance(saved, Parts) else saved[first : first + count]
    local = rows.to(own.to_local().device, copy=True)  # not the file's own pages
    return DTensor.from_local(
        local, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def is_dtensor(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def first_row(tensor: Any) -> int:
    """Where this rank's rows of a tensor begin: FSDP2 cuts it along its first dimension as `torch.chunk` does.

    Raises:
        ValueError: it is cut in another way.
    """
    from torch.distributed.tensor import Shard

    if tuple(tensor.placements) != (Shard(0),):
        raise ValueError(f"a tensor is sharded as {tensor.placements}; expected Shard(0) over one mesh dimension")
    mesh = tensor.device_mesh
    return min(-(-tensor.shape[0] // mesh.size()) * mesh.get_local_rank(), tensor.shape[0])


def save_sharded(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint whose sharded tensors stay where they are, or leave what was; every rank calls it.

    Args:
        checkpoint: of this rank; what is not sharded is taken from rank 0.
        folder: where; its name ends in `SUFFIX`.

    Raises:
        RunError: a rank could not write its part; raised on every rank.
    """
    mine: dict[tuple, tuple[int, Tensor]] = {}
    shapes: dict[tuple, list[int]] = {}

    def take(place: tuple, leaf: Any) -> Any:
        if not is_dtensor(leaf):
            return leaf
        shapes[place] = list(leaf.shape)
        rows = leaf.to_local().detach()
        if len(rows):
            mine[place] = first_row(leaf), rows.to("cpu", copy=True)  # not the padded memory around it
        return None

    rest = map_tree(checkpoint, take)
    number = _together(folder, lambda: _begin(folder) if rank() == 0 else 0)[0]

    def write() -> dict[str, str]:
        files: dict[str, Any] = {f"{number}-rank-{rank():05d}-of-{world_size():05d}.pt": mine}
        if rank() == 0:
            files[f"{number}-rest.pt"] = {"sharded": shapes, "checkpoint": rest}
        return {name: _write(folder / name, content) for name, content in files.items()}

    try:
        files = {name: digest for written in _together(folder, write) for name, digest in written.items()}
    except RunError:
        if rank() == 0:
            _tidy(folder)
        raise
    _together(folder, lambda: _finish(folder, {"number": number, "files": files}) if rank() == 0 else None)


def problem(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint; None if it is one."""
    index = _index(folder)
    if index is None:
        return f"it has no readable {INDEX}: its save was interrupted"
    for name, digest in index["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if checksum(folder / name) != digest:
            return f"the content of {name} does not match its checksum"
    return None


def size(folder: Path) -> int:
    """Bytes of a sharded checkpoint."""
    return sum(file.stat().st_size for file in folder.iterdir())


def remove(folder: Path) -> None:
    """Delete it; no moment leaves a damaged one."""
    (folder / INDEX).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def map_tree(tree: Any, function: Callable[[tuple, Any], Any], place: tuple = ()) -> Any:
    """Nested dicts and lists with every leaf replaced by `function(place, leaf)`; place: the keys that lead to it."""
    if isinstance(tree, dict):
        return {key: map_tree(value, function, (*place, key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tree(value, function, (*place, i)) for i, value in enumerate(tree))
    return function(place, tree)


def _begin(folder: Path) -> int:
    """Make room for the next save; returns its number."""
    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder)
    index = _index(folder)
    return 1 if index is None else index["number"] + 1


def _write(path: Path, content: Any) -> str:
    """Its checksum, once it is on the disk."""
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return checksum(path)


def _finish(folder: Path, index: dict[str, Any]) -> None:
    sync_folder(folder)  # the names of the new files, before the index that names them
    with replacing(folder / INDEX) as file:
        file.write(json.dumps(index, indent=1).encode())
    sync_folder(folder.parent)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Delete what the index does not name."""
    index = _index(folder) or {"files": ()}
    for file in folder.iterdir():
        if file.name != INDEX and file.name not in index["files"]:
            file.unlink()


def _index(folder: Path) -> dict[str, Any] | None:
    """None where there is none, or none that can be read."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        is_sound = isinstance(index["number"], int) and all(Path(name).name == name for name in index["files"])
        return index if is_sound and all(isinstance(digest, str) for digest in index["files"].values()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _together(folder: Path, work: Callable[[], Result]) -> list[Result]:
    """What `work` returned on each rank, once all are done.

    Raises:
        RunError: it failed on one of them.
    """
    result, failure = None, None
    try:
        result = work()
    except (OSError, RuntimeError) as error:  # torch hides the system's error behind one of its own
        failure = str(error.__context__ if isinstance(error.__context__, OSError) else error)
    told: list[Any] = [(result, failure)]
    if world_size() > 1:
        told = [None] * world_size()
        dist.all_gather_object(told, (result, failure))
    failures = {number: said for number, (_, said) in enumerate(told) if said is not None}
    if failures:
        number, said = next(iter(failures.items()))
        raise RunError(
            f"{folder} could not be saved (rank {number}): {said}. Earlier checkpoints are whole; make room and resume"
        )
    return [value for value, _ in told]
