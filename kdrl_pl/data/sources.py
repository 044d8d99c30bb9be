"""Where rows come from: local files, Hugging Face data sets and procedural tasks, all by one `source` string."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdrl_pl.data import tasks
from kdrl_pl.data.readers import SUFFIXES, FileRow, arrow_rows, read_file
from kdrl_pl.data.template import Template

# A `datasets.Dataset`. Not named as such even for type checkers: the parser runs the imports under TYPE_CHECKING of
# every module that holds a config class, and this one takes a second.
Dataset = Any
Kind = Literal["task", "files", "folder", "saved", "hub"]
_HAS_SUFFIX = re.compile(r"\.[A-Za-z]{2,8}$")  # ".jsonl", but not the ".5" or ".v2" of a version
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# settings that only some kinds understand; given to another kind they would be silently dead
_ONLY_FOR: dict[str, tuple[Kind, ...]] = {
    "split": ("task", "folder", "saved", "hub"),
    "subset": ("folder", "hub"),
    "revision": ("hub",),
    "options": ("task",),
    "columns": ("files", "folder", "saved", "hub"),
}


@dataclass
class SourceConfig:
    """One named set of rows.

    Args:
        source: where the rows come from. A procedural task ("addition", "countdown", "knights",
            "word_problems", "reasoning_gym:<task>"); a file or glob with suffix .jsonl, .json, .csv or .parquet; a
            folder of such files or one written by `save_to_disk` ("./folder", "/folder" or "~/folder"); else a hub name
            "owner/name". Whatever has a file suffix or starts with ".", "/" or "~" is a path and must exist.
        split: of a hub data set or saved folder; in a folder of files the word in the file names ("train"); of a task
            "train", "val", "test" (disjoint by construction) or "all", by default that of the section.
        subset: configuration of a hub data set, or sub-folder of a folder of files.
        revision: branch, tag or commit of a hub data set.
        size: number of problems a task makes (required there), otherwise the most rows to read, from the first on.
        seed: of a procedural task.
        options: keyword arguments of a procedural task, for example {digits: 3}.
        prompt_column: column with the question: text, or a list of messages with role and content.
        columns: further columns to keep for the reward; null keeps all, [] none (long columns cost memory).
        template: how this set's prompts become text, in place of the common one.
    """

    source: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    size: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    prompt_column: str = "prompt"
    columns: list[str] | None = None
    template: Template | None = None


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Args:
        number: its place in the source, counted from 1 (lines of a JSON Lines file) and on over all files.
        where: file (or data set) and row, for messages.
        columns: the row; empty where it cannot be read.
        problem: why it cannot be read; empty where it can.
    """

    number: int
    where: str
    columns: dict[str, Any]
    problem: str = ""


def kind_of(source: str) -> Kind:
    """Which kind of source the string names; paths are checked.

    Raises:
        ValueError: neither a task, nor an existing path, nor a possible hub name.
    """
    if tasks.is_task(source):
        return "task"
    path = Path(source).expanduser()
    if glob.has_magic(source):
        if not glob.glob(str(path), recursive=True):
            raise ValueError(f"source {source!r} matches no file (looked in {Path.cwd()})")
        return "files"
    if path.is_file():
        return "files"
    if source and path.is_dir():
        is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return "saved" if is_saved else "folder"
    if source.startswith((".", "/", "~")) or _HAS_SUFFIX.search(source):
        raise ValueError(f"source {source!r} is a path, and nothing is there (looked in {Path.cwd()})")
    if _HUB_NAME.fullmatch(source):
        return "hub"
    raise ValueError(
        f"source {source!r} is neither a task ({', '.join(tasks.names())}) nor a path that exists nor a hub name "
        "like owner/name"
    )


def read_rows(config: SourceConfig, default_split: str = "train", keep: Iterable[str] = ()) -> Iterator[Row]:
    """The rows of a source, unreadable ones included.

    Args:
        config: what to read.
        default_split: split of a procedural task whose config names none.
        keep: columns that are needed besides `config.columns`; of a dotted name the part before the first dot counts.

    Raises:
        ValueError: the source does not exist, cannot be read as a whole, or a setting makes no sense for its kind.
    """
    kind = kind_of(config.source)
    for setting, kinds in _ONLY_FOR.items():
        if getattr(config, setting) not in (None, {}) and kind not in kinds:
            raise ValueError(
                f"{setting} has no meaning for source {config.source!r} (read as: {kind}); it belongs to "
                f"{' and '.join(kinds)} sources; remove it"
            )
    if config.size is not None and config.size < 1:
        raise ValueError(
            f"size is {config.size} for source {config.source!r}; expected at least 1, or null for all rows"
        )
    wanted = None
    if config.columns is not None:
        wanted = {name for key in [*config.columns, *keep] for name in (key, key.partition(".")[0])}
    for row in _rows(config, kind, default_split, wanted):
        if config.size is not None and row.number > config.size:
            return
        yield row


def _rows(config: SourceConfig, kind: Kind, default_split: str, wanted: set[str] | None) -> Iterator[Row]:
    if kind == "task":
        if config.size is None:
            raise ValueError(f"source {config.source!r} is a procedural task; set size, the number of problems to make")
        rows = tasks.make(config.source, config.size, config.seed, config.split or default_split, **config.options)
        yield from _named(config.source, enumerate(rows, 1))
    elif kind in ("hub", "saved"):
        data = load_hub(config) if kind == "hub" else _load_saved(config)
        if wanted is not None:
            data = data.select_columns([name for name in data.column_names if name in wanted])
        yield from _named(config.source, arrow_rows(data.with_format("arrow").iter(batch_size=1024)))
    else:
        offset = last = 0
        for path in _files(config, kind):
            for row in _named(path, read_file(path, wanted), offset):
                last = row.number
                yield row
            offset = last


def _named(where: str | Path, rows: Iterable[FileRow], offset: int = 0) -> Iterator[Row]:
    for number, row in rows:
        place = f"{where}, row {number}"
        yield Row(offset + number, place, {}, row) if isinstance(row, str) else Row(offset + number, place, row)


def _files(config: SourceConfig, kind: Kind) -> list[Path]:
    """The files to read, in alphabetical order."""
    path = Path(config.source).expanduser()
    if kind == "files":
        return sorted(map(Path, glob.glob(str(path), recursive=True))) if glob.has_magic(config.source) else [path]
    folder = path / (config.subset or "")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if config.split:
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(config.split)}(?![A-Za-z0-9])")
        found = [file for file in files if word.search(file.relative_to(folder).as_posix())]
        if files and not found:
            names = ", ".join(file.relative_to(folder).as_posix() for file in files[:8])
            raise ValueError(f"no file of folder {folder} has {config.split!r} in its name; found {names}")
        files = found
    if not files:
        raise ValueError(f"folder {folder} holds no file with suffix {', '.join(SUFFIXES)}")
    return files


def load_hub(config: SourceConfig) -> Dataset:
    """A data set of the hub (downloaded once, then cached).

    Raises:
        ValueError: it cannot be found or reached, or the split or subset is missing or unknown.
    """
    import datasets

    try:
        data = datasets.load_dataset(config.source, config.subset, split=config.split, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data set {config.source!r} cannot be loaded from the hub: {error}; "
            f"a local folder is written ./{config.source}"
        ) from error
    return _one_split(config, data)


def _load_saved(config: SourceConfig) -> Dataset:
    import datasets

    data = datasets.load_from_disk(str(Path(config.source).expanduser()))
    if isinstance(data, datasets.Dataset):
        if config.split:
            raise ValueError(f"source {config.source!r} holds one data set without splits; remove split")
        return data
    if config.split and config.split not in data:
        raise ValueError(f"source {config.source!r} has no split {config.split!r}; it has {', '.join(data)}")
    return data[config.split] if config.split else _one_split(config, data)


def _one_split(config: SourceConfig, data: Any) -> Dataset:
    import datasets

    if isinstance(data, datasets.Dataset):
        return data
    if len(data) != 1:
        raise ValueError(f"source {config.source!r} has several splits; set split to one of {', '.join(data)}")
    return next(iter(data.values()))
