"""Reads a run folder, whole or as far as the run has come. Nothing but its own files is read, and none is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_pl.cli.configs import read_yaml
from kdrl_pl.files import JSONLines

Rows = list[dict[str, Any]]
Results = Mapping[str, Mapping[str, float]]  # set -> metrics

_STORED = re.compile(r"(\d{6,})(?:-rank(\d+))?\.jsonl")
_VALIDATED = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Args:
        folder: where it lies.
        config: its config.yaml.
        training: rows of metrics.jsonl, one per rollout (steps in kdrl sft).
        validations: the others, one per validation.
        summary: of summary.json; None while the run goes on, and where it was stopped.
        environment: of env.json; None where there is none.
        alarms: rows of alarms.jsonl.
        samples: rollouts done -> what `ValidationSamples` kept of the validation there.
    """

    folder: Path
    config: dict[str, Any]
    training: Rows
    validations: Rows
    summary: dict[str, Any] | None
    environment: dict[str, Any] | None
    alarms: Rows
    samples: dict[int, dict[str, Any]]

    @property
    def name(self) -> str:
        """`<name of the run>/<time>`, as it stands on disk."""
        return "/".join(self.folder.parts[-2:])

    @property
    def counter(self) -> str:
        """What its metrics are counted by: "rollout", or "step" in kdrl sft."""
        return "rollout" if "rollout" in (self.config or {}) else "step"

    @property
    def done(self) -> int:
        """Rollouts (steps) that are in the metrics."""
        return max((self.position(row) for row in (*self.training, *self.validations)), default=0)

    def position(self, row: Mapping[str, Any]) -> int:
        """Rollouts (steps) done when this row of metrics was written."""
        return row["rollout"] + 1 if self.counter == "rollout" else row["global_step"]

    @property
    def before(self) -> Results | None:
        """Validation before the first update; None when it is not known (yet)."""
        if self.summary is not None and self.summary["val"]["before"] is not None:
            return self.summary["val"]["before"]
        return self.samples[0]["results"] if 0 in self.samples else None

    @property
    def after(self) -> Results:
        """The newest validation after the first update; empty before it."""
        if self.summary is not None:
            return self.summary["val"]["after"]
        return validation_results(self.validations[-1]) if self.validations else {}

    def stored(self) -> list[int]:
        """Numbers of the rollouts whose rows are on disk, in order."""
        return sorted({int(match[1]) for file in self._rollout_files() if (match := _STORED.fullmatch(file.name))})

    def rows(self, rollout: int) -> Rows:
        """Rows of a stored rollout (see `records.rollout_rows`), those of all ranks; empty when they are gone."""
        rows: Rows = []
        for file in self._rollout_files():
            match = _STORED.fullmatch(file.name)
            if match and int(match[1]) == rollout:
                try:
                    rows += JSONLines(file).read()
                except FileNotFoundError:  # the run goes on and has just deleted it
                    continue
        return rows

    def _rollout_files(self) -> list[Path]:
        """In the order of ranks."""
        folder = self.folder / "rollouts"
        return sorted(folder.iterdir(), key=lambda f: (len(f.name), f.name)) if folder.is_dir() else []


def read_run(folder: str | Path) -> Run:
    """What a run folder says, also while the run goes on: a row half written is not read.

    Raises:
        FileNotFoundError: there is no such folder, or it is not that of a run.
        ValueError: one of its files is damaged; names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}; give one like runs/quickstart/2026-01-31_12-00-00")
    if not (folder / "config.yaml").is_file():
        inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise FileNotFoundError(f"{folder} holds no config.yaml, so it is not the folder of a run{hint}")
    folder = folder.resolve()
    config = read_yaml(folder / "config.yaml")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.yaml'} holds no settings; expected what kdrl fit wrote")
    metrics = JSONLines(folder / "metrics.jsonl").read()
    samples = {}
    for file in sorted((folder / "validation").glob("*.json")):
        if _VALIDATED.fullmatch(file.name) and (content := _read_json(file)) is not None:
            samples[int(file.stem)] = content
    return Run(
        folder=folder,
        config=config,
        training=[row for row in metrics if not _is_validation(row)],
        validations=[row for row in metrics if _is_validation(row)],
        summary=_read_json(folder / "summary.json"),
        environment=_read_json(folder / "env.json"),
        alarms=JSONLines(folder / "alarms.jsonl").read(),
        samples=samples,
    )


def validation_results(row: Mapping[str, Any]) -> Results:
    """Set -> metrics of a row `val/<set>/<metric>`; what is averaged over sets is left out."""
    results: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        group, _, rest = name.partition("/")
        of, _, metric = rest.rpartition("/")
        if group == "val" and of and value is not None:
            results.setdefault(of, {})[metric] = value
    return results


def _is_validation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("val/") for name in row)


def _read_json(file: Path) -> dict[str, Any] | None:
    """An object, or None where there is no file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object; move it away, the rest can still be shown")
    return content
