"""Numbers by key in a SQLite file: bounded, shared by processes, whole after a kill, set aside when damaged."""

from __future__ import annotations

import fcntl
import logging
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from zlib import crc32

log = logging.getLogger(__name__)

Result = TypeVar("Result")

WAIT = 60.0  # seconds for which a process waits until another one has written
AT_ONCE = 500  # keys per query
_NAME = re.compile(r"rows-(\d+)\.sqlite(\.damaged)?")
_SCHEMA = "CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB UNIQUE, value BLOB)"


class Store:
    """Values by key, the oldest of which go when the file is full.

    The file is `rows-<n>.sqlite` in its folder; a damaged one is renamed to `….damaged`, said, and followed by the next
    number, so that processes which still have it open cannot harm its successor. Troubles of the disk are said once and
    cost what is stored, never the run.

    Args:
        folder: on a local disk (the file is shared through memory); made when it is missing.
        max_bytes: of the file; room is made by dropping the oldest values.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder).expanduser(), max_bytes
        self._connection: sqlite3.Connection | None = None
        self._number = 0
        self._has_complained = False

    def open(self) -> None:
        """Make folder and file, if they are missing.

        Raises:
            OSError: the folder cannot be made or written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            pass
        self._safely(lambda _: None, None)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that it holds."""
        return self._safely(lambda connection: _read(connection, list(keys)), {})

    def put(self, values: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """Store all values in one transaction, and return what is stored under their keys from now on.

        Where another process was first, that is its value.
        """
        return self._safely(lambda connection: self._write(connection, values), dict(values)) if values else {}

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _write(self, connection: sqlite3.Connection, values: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._make_room(connection, sum(len(value) + 64 for value in values.values()))
            rows = ((key, crc32(value).to_bytes(4, "little") + value) for key, value in values.items())
            connection.executemany("INSERT OR IGNORE INTO rows (key, value) VALUES (?, ?)", rows)
            stored = _read(connection, list(values))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return {**values, **stored}

    def _make_room(self, connection: sqlite3.Connection, incoming: int) -> None:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        missing = (pages - free) * size + incoming - self.max_bytes
        last = None
        for number, length in connection.execute("SELECT id, length(value) FROM rows ORDER BY id"):
            if missing <= 0:
                break
            last, missing = number, missing - length
        if last is not None:
            connection.execute("DELETE FROM rows WHERE id <= ?", (last,))

    def _safely(self, use: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """`use`, on a new file if the present one is damaged; `otherwise` where the disk does not let us."""
        for _ in range(2):
            try:
                if self._connection is None:
                    self._connection = self._connect()
                return use(self._connection)
            except (sqlite3.OperationalError, OSError) as error:
                self._complain(error)
                return otherwise
            except sqlite3.DatabaseError as error:
                try:
                    self.close()
                    self._set_aside(error)
                except (sqlite3.Error, OSError) as trouble:
                    self._complain(trouble)
                    return otherwise
        return otherwise

    def _connect(self) -> sqlite3.Connection:
        with self._lock():
            self._number = self._newest()
            connection = sqlite3.connect(self._path(), timeout=WAIT, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute(f"PRAGMA journal_size_limit={2**26}")
                connection.execute(_SCHEMA)
            except BaseException:
                connection.close()
                raise
        return connection

    def _set_aside(self, error: Exception) -> None:
        """Rename the file that we had open, unless another process has done so already."""
        with self._lock():
            path = self._path()
            if not path.exists():
                return
            aside = path.with_name(f"{path.name}.damaged")
            path.rename(aside)
        log.warning("%s is damaged (%s): it is now %s, and an empty one follows", path, error, aside.name)

    def _newest(self) -> int:
        """The number of the file in use: behind all damaged ones."""
        found = [match for file in self.folder.iterdir() if (match := _NAME.fullmatch(file.name))]
        return max((int(match[1]) + bool(match[2]) for match in found), default=0)

    def _path(self) -> Path:
        return self.folder / f"rows-{self._number}.sqlite"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time; the system lets go of it when a process dies."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            self._has_complained = True
            log.warning("%s: %s; what it does not take or give is computed", self.folder, error)


def _read(connection: sqlite3.Connection, keys: list[bytes]) -> dict[bytes, bytes]:
    """What is stored under `keys`.

    Raises:
        sqlite3.DatabaseError: a value is not what was written.
    """
    found: dict[bytes, bytes] = {}
    for start in range(0, len(keys), AT_ONCE):
        part = keys[start : start + AT_ONCE]
        marks = ",".join("?" * len(part))
        found.update(connection.execute(f"SELECT key, value FROM rows WHERE key IN ({marks})", part).fetchall())
    for key, value in found.items():
        if crc32(value[4:]).to_bytes(4, "little") != value[:4]:
            raise sqlite3.DatabaseError("a value fails its checksum")
        found[key] = value[4:]
    return found
