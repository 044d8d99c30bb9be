"""Rollouts that runs left on disk, as `Experience` again: rows in JSON Lines, or tensors of those that went wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from kdrl_pl.experience import Experience
from kdrl_pl.files import JSONLines

_NAME = re.compile(r"(?:rollout-)?(\d+)(?:-rank\d+)?\.(?:jsonl|pt)")


def stored_rollouts(paths: Iterable[str | Path]) -> dict[str, list[Path]]:
    """The files of every stored rollout by its name, in order; several of one rollout are those of its ranks.

    Args:
        paths: run folders (their rollouts/), and files `000123.jsonl` or `rollout-000123.pt` of any run.

    Raises:
        FileNotFoundError: a path is not there, or a run folder has no rollouts.
        ValueError: a file has another name.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted((path / "rollouts").glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise FileNotFoundError(
                f"no stored rollouts at {path}; give a run folder that has rollouts/ (run.keep_rollouts), or files"
            )
        files += found
    stored: dict[str, list[Path]] = {}
    for file in files:
        if not _NAME.fullmatch(file.name):
            raise ValueError(f"{file} is no stored rollout; expected a name like 000123.jsonl or rollout-000123.pt")
        # Rows are joined over ranks; a file of tensors stands for itself.
        name = str(file.with_name(re.sub(r"-rank\d+", "", file.name))) if file.suffix == ".jsonl" else str(file)
        stored.setdefault(name, []).append(file)
    return {name: sorted(ranks, key=lambda file: (len(file.name), file.name)) for name, ranks in stored.items()}


def load_rollout(
    files: Sequence[Path], temperature: float = 1.0, max_response_tokens: int | None = None
) -> tuple[int, Experience]:
    """Number and rows of a stored rollout.

    Args:
        files: of one rollout, from `stored_rollouts`.
        temperature, max_response_tokens: see `rollout_of_rows`; a file of tensors knows its own.
    """
    number = int(_NAME.fullmatch(files[0].name)[1])
    if files[0].suffix == ".pt":
        return number, Experience.load(files[0])
    # Every rank numbers its groups from 0.
    rows = [{**row, "group": (rank, row["group"])} for rank, file in enumerate(files) for row in JSONLines(file).read()]
    return number, rollout_of_rows(rows, temperature, max_response_tokens)


def rollout_of_rows(
    rows: Sequence[Mapping[str, Any]], temperature: float = 1.0, max_response_tokens: int | None = None
) -> Experience:
    """The experience of rows that `records.rollout_rows` wrote, scores left out: `score` makes them anew.

    Args:
        rows: of one rollout; rows of a group stand together.
        temperature: of the sampler.
        max_response_tokens: its budget, for the normaliser "constant".
    """
    starts = [i == 0 or row["group"] != rows[i - 1]["group"] for i, row in enumerate(rows)]
    known = all(row["behavior_logprobs"] is not None for row in rows)
    return Experience.from_rows(
        [row["prompt_ids"] for row in rows],
        [row["response_ids"] for row in rows],
        [row["reward"] for row in rows],
        [number - 1 for number in accumulate(starts)],
        behavior_logprobs=[row["behavior_logprobs"] for row in rows] if known else None,
        correct=[row["correct"] for row in rows],
        truncated=[row["truncated"] for row in rows],
        temperature=temperature,
        max_response_tokens=max_response_tokens,
        uids=[row["uid"] for row in rows],
        teachers=[row.get("teacher") for row in rows],
    )
