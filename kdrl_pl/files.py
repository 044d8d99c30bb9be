"""Files that survive a kill at any moment: rows are appended whole, everything else is moved into its place.

JSON has no NaN or infinity: they are written as null. Text is written in ASCII escapes, so that no control character
or half of a surrogate pair in a model's output can break a file or a terminal.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


class JSONLines:
    """One JSON object per line, appended so that a killed process loses at most the row it was writing.

    A last line without its newline is such a torn row: it is not read, and it is cut off before the next append. One
    process writes; any number may read meanwhile.

    Args:
        path: the file; its folder is made on the first append.
        fsync: wait for the disk after every append, so that rows survive a power cut too.
    """

    def __init__(self, path: str | Path, fsync: bool = False) -> None:
        self.path = Path(path)
        self.fsync = fsync

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add `rows` at the end, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join(json_line(row) for row in rows)
        with open(self.path, "a+b", buffering=0) as file:
            _cut_torn_line(file)
            while data:  # one write, unless the system takes less
                data = data[file.write(data) :]
            if self.fsync:
                os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole rows; none when there is no file.

        Raises:
            ValueError: a line in the middle is not a JSON object.
        """
        return [row for _, row in self._lines()]

    def truncate_after(self, key: str, value: float) -> int:
        """Drop the rows with `row[key] >= value`, and a torn last line; returns the number of rows dropped.

        Rows without `key` stay. The file is replaced as a whole, and only when something is dropped.
        """
        if not self.path.exists():
            return 0
        lines = list(self._lines())
        kept = [line for line, row in lines if row.get(key) is None or row[key] < value]
        if sum(map(len, kept)) == self.path.stat().st_size:
            return 0
        with replacing(self.path) as file:
            file.writelines(kept)
        return len(lines) - len(kept)

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{self.path}, line {number}: {line[:60]!r} is not a JSON object; "
                        "only the last line of a killed run can be damaged: delete or mend this one"
                    )
                yield line, row


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _dumps(value, indent=2)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file in the same folder that takes the place of `path` when all is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk: else a power cut can forget a new one."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def checksum(path: Path) -> str:
    """32 hex digits of BLAKE2b over a file."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut a last line without its newline off a file opened for appending."""
    end = size = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - (1 if end == size else 65536))  # the last byte tells nearly always
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def json_line(row: Mapping[str, Any]) -> bytes:
    return _dumps(row, separators=(",", ":")).encode() + b"\n"


def _dumps(value: Any, **style: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, default=_plain, **style)
    except ValueError:  # a NaN or an infinity: rare, so only then is every number looked at
        return json.dumps(_finite(value), allow_nan=False, **style)


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists or numbers, paths as strings."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(
        f"{type(value).__name__} cannot be written as JSON; expected numbers, strings, lists, dicts, tensors"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if value is None or isinstance(value, str | int) else _finite(_plain(value))
