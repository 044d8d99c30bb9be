"""What came of the runs of a study: read from their folders, kept in one JSON, task -> arm -> lists per seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdrl_pl.errors import RunError
from kdrl_pl.files import JSONLines, replacing
from kdrl_pl.study.plan import Run
from kdrl_pl.summary import mean_over_sets

_HEAD = ("digest", "rollouts")  # of an entry; everything else is a list with one item per seed


def read_run(folder: Path, rollouts: int) -> dict[str, Any] | None:
    """The figures of a finished run, or None when it is not finished.

    - `pass@1`, `pass@<k>`: shares of the last validation, plain mean over its sets; k = samples per problem
    - `length`: of a response of that validation [tokens]
    - `seconds`: of training, without validations; `teacher_seconds`: of those, the teacher's pass
    - `tokens`: sampled for training
    - `curve`: `rollouts` done, `seconds` of training until then and `pass@1`, of every validation
    - `machine`: what it ran on

    Args:
        folder: holds the run folders, one per start from scratch.
        rollouts: a run that did fewer is not finished.

    Raises:
        RunError: the run was not validated.
    """
    for file in sorted(folder.glob("*/summary.json"), reverse=True):
        summary = json.loads(file.read_text())
        if summary["rollouts"] >= rollouts:
            return _figures(file.parent, summary)
    return None


def _figures(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    before, after = summary["val"]["before"], summary["val"]["after"]
    if mean_over_sets(after) is None:
        raise RunError(f"{folder} was not validated; the runs of a study need a set in data.val")
    largest = max(
        int(name.removeprefix("pass_at_")) for metrics in after.values() for name in metrics if "pass_at_" in name
    )
    rows = JSONLines(folder / "metrics.jsonl").read()
    training = [row for row in rows if "validation" not in row]
    validated = [(row["rollout"] + 1, row["val/avg_at_k"]) for row in rows if "validation" in row]
    if before is not None:
        validated.insert(0, (0, mean_over_sets(before)))
    names = {"pass@1": "avg_at_k", f"pass@{largest}": f"pass_at_{largest}", "length": "length"}
    return {
        **{name: mean_over_sets(after, metric) for name, metric in names.items()},
        "seconds": _sum(training, "time/step"),
        "teacher_seconds": _sum(training, "time/teacher"),
        "tokens": summary["tokens"],
        "curve": {
            "rollouts": [done for done, _ in validated],
            "seconds": [_sum(training, "time/step", done) for done, _ in validated],
            "pass@1": [round(share, 5) for _, share in validated],
        },
        "machine": _machine(folder / "env.json"),
    }


def _sum(rows: Iterable[Mapping[str, Any]], name: str, until: float = float("inf")) -> float:
    return round(sum(row.get(name) or 0.0 for row in rows if row["rollout"] < until), 2)


def _machine(file: Path) -> str:
    env = json.loads(file.read_text())
    devices = [device["name"] for device in env["devices"]]
    cpu = env["cpu"]
    threads = f"{cpu['torch_threads']} thread{'s' if cpu['torch_threads'] > 1 else ''}"
    return ", ".join([*devices, f"{cpu['name']}, {cpu['count']} cores, {threads}"])


class Results:
    """Figures of the runs of a study, by testbed, arm and seed.

    As JSON: `{testbed: {arm: {"digest": …, "rollouts": …, "seeds": [0, 1, …], "pass@1": [one per seed], …}}}`. All
    figures of an arm were made with the settings of its digest.
    """

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, dict[str, Any]]] = {}

    @classmethod
    def load(cls, file: Path) -> Results:
        """What `save` wrote; nothing when there is no file.

        Raises:
            ValueError: the file is something else.
        """
        results = cls()
        if file.exists():
            try:
                results.entries = json.loads(file.read_text())
                for _, _, entry in results:
                    lengths = {len(value) for name, value in entry.items() if name not in _HEAD}
                    if len(lengths) != 1 or not {"digest", "seeds"} <= set(entry):
                        raise ValueError("lists of different lengths")
            except (ValueError, AttributeError, TypeError):
                raise ValueError(f"{file} holds no results of a study; move it away, or name another page") from None
        return results

    def __iter__(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(testbed, arm, entry) of each."""
        return ((testbed, arm, entry) for testbed, arms in self.entries.items() for arm, entry in arms.items())

    def has(self, run: Run) -> bool:
        """Whether there are figures of `run`, with its settings."""
        entry = self.entry(run)
        return entry is not None and run.seed in entry["seeds"]

    def entry(self, run: Run) -> dict[str, Any] | None:
        """All seeds of the arm of `run`, None when there are none with its settings."""
        entry = self.entries.get(run.testbed, {}).get(run.arm)
        return entry if entry is not None and entry["digest"] == run.digest else None

    def add(self, run: Run, figures: Mapping[str, Any]) -> None:
        """Put in the figures of `run`; those with other settings of its arm give way."""
        self._put(run.testbed, run.arm, {"digest": run.digest, "rollouts": run.rollouts}, run.seed, figures)

    def merge(self, other: Results, digests: Mapping[tuple[str, str], str]) -> None:
        """Put in all figures of `other`, seed by seed.

        Args:
            other: where both have a seed of an arm, its figures count.
            digests: of the arms of today, by testbed and arm: where the two have other settings, these decide, and
                `other` where they do not.
        """
        for testbed, arm, theirs in other:
            ours = self.entries.get(testbed, {}).get(arm)
            if ours is not None and theirs["digest"] != ours["digest"] == digests.get((testbed, arm)):
                continue
            head = {name: theirs[name] for name in _HEAD if name in theirs}
            for position, seed in enumerate(theirs["seeds"]):
                figures = {n: v[position] for n, v in theirs.items() if n not in (*_HEAD, "seeds")}
                self._put(testbed, arm, head, seed, figures)

    def _put(self, testbed: str, arm: str, head: Mapping[str, Any], seed: int, figures: Mapping[str, Any]) -> None:
        arms = self.entries.setdefault(testbed, {})
        entry = arms.get(arm)
        per_seed = {}
        if entry is not None and entry["digest"] == head["digest"]:
            lists = {name: value for name, value in entry.items() if name not in (*_HEAD, "seeds")}
            per_seed = {old: {n: v[i] for n, v in lists.items()} for i, old in enumerate(entry["seeds"])}
        per_seed[seed] = dict(figures)
        seeds = sorted(per_seed)
        arms[arm] = {
            **head,
            "seeds": seeds,
            **{name: [per_seed[seed][name] for seed in seeds] for name in figures},
        }

    def save(self, file: Path) -> None:
        """Write the JSON, one line per list; a reader sees the old file or the new one."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(_json(self.entries).encode() + b"\n")


def _json(value: Any, indent: str = "") -> str:
    deeper = indent + "  "
    if isinstance(value, dict):
        items = [f"{deeper}{json.dumps(key)}: {_json(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}" if items else "{}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"{deeper}{json.dumps(item)}" for item in value) + f"\n{indent}]"
    return json.dumps(value)
