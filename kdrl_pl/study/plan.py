"""The runs of a study: which there are, what each is made of, and the command that does it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdrl_pl.cli.configs import merge, read_configs
from kdrl_pl.resources import find
from kdrl_pl.study.config import Study, unknown

# What decides nothing that a study reports: names and files, and sets that `kdrl fit` does not read.
_IRRELEVANT = {"run": None, "checkpoint": None, "data": ("test", "predict"), "trainer": ("logger",)}


@dataclass(frozen=True)
class Run:
    """One `kdrl fit`.

    Args:
        testbed: its name.
        arm: its name.
        seed: of prompts and samples.
        rollouts: how many.
        config: files, the testbed's first.
        set: settings of the arm, dotted name -> value.
        digest: of everything that decides the figures, but the seed.
        sft: the run imitates instead (`study.imitation`), with these settings of `kdrl sft`.
    """

    testbed: str
    arm: str
    seed: int
    rollouts: int
    config: tuple[str, ...]
    set: Mapping[str, Any]
    digest: str
    sft: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.testbed}/{self.arm}/{self.seed}"

    def folder(self, root: Path) -> Path:
        """Where its run folder, its log and its lock lie; other settings have another one."""
        return root / self.testbed / self.arm / f"seed-{self.seed}-{self.digest}"

    def command(self, root: Path) -> list[str]:
        """The command that starts the run, or goes on with it from its newest checkpoint.

        Args:
            root: folder of the study.
        """
        folder = self.folder(root)
        if self.sft is not None:
            return [
                *(sys.executable, "-m", "kdrl_pl.study.imitation"),
                *(f"--config={file}" for file in self.config),
                *(f"--set={name}={_as_argument(value)}" for name, value in self.sft.items()),
                *("--folder", str(folder), "--seed", str(self.seed), "--rollouts", str(self.rollouts)),
            ]
        return [
            *(sys.executable, "-m", "kdrl_pl", "fit"),
            # In one word each, so that no file name or value can be an option itself.
            *(f"--config={file}" for file in self.config),
            *(f"--{name}={_as_argument(value)}" for name, value in self.set.items()),
            *("--rollout.seed", str(self.seed), "--data.seed", str(self.seed)),
            *("--run.root", str(folder.parent), "--run.name", folder.name),
            *("--run.max_rollouts", str(self.rollouts), "--resume", "auto"),
        ]


def plan(study: Study, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """The runs of a study, seed by seed, so that a study cut short has every arm as often as the others.

    Args:
        study: as its file says.
        only: patterns like `addition/kdrl`, `*/grpo/0`: a run that matches one is in; none = all.
        seeds: instead of those of the study and its arms.

    Raises:
        FileNotFoundError: a config file is not there.
        ValueError: a testbed has no number of rollouts, or a pattern fits no run.
    """
    runs = []
    for testbed, files in study.testbeds.items():
        base = read_configs(files)
        rollouts = study.rollouts or (base.get("run") or {}).get("max_rollouts")
        if rollouts is None:
            raise ValueError(
                f"testbed {testbed} has no number of rollouts; give the study rollouts: or its config run.max_rollouts"
            )
        for name, arm in study.arms.items():
            if testbed not in arm.testbeds:
                continue
            merged = merge(base, read_configs(arm.config))
            for setting, value in arm.set.items():
                merged = merge(merged, _nested(setting, value))
            if arm.sft is not None:
                merged = {**merged, "sft": [read_configs(["configs/sft.yaml"]), dict(arm.sft)]}
            digest = settings_digest(merged, rollouts)
            config = (*files, *arm.config)
            runs += [
                Run(testbed, name, seed, rollouts, config, arm.set, digest, arm.sft) for seed in seeds or arm.seeds
            ]
    chosen = set()
    for pattern in only:
        wide = pattern if pattern.count("/") >= 2 else f"{pattern}/*"
        found = {run.name for run in runs if fnmatch.fnmatchcase(run.name, wide)}
        if not found:
            raise ValueError(f"--only: {unknown('run', pattern, dict.fromkeys(f'{r.testbed}/{r.arm}' for r in runs))}")
        chosen |= found
    runs.sort(key=lambda run: run.seed)  # stable: testbeds and arms stay in the order of the file
    return [run for run in runs if not only or run.name in chosen]


def settings_digest(config: Mapping[str, Any], rollouts: int) -> str:
    """8 hex digits over the settings of a run, its number of rollouts, and the files of its models.

    Args:
        config: merged config files and settings.
        rollouts: how many.
    """
    kept: dict[str, Any] = {}
    for section, value in config.items():
        left_out = _IRRELEVANT.get(section, ())
        if left_out is not None:
            kept[section] = {k: v for k, v in (value or {}).items() if k not in left_out} if left_out else value
    model = config.get("model") or {}
    teacher = model.get("teacher")
    teacher = {**teacher, **(teacher.get("init_args") or {})} if isinstance(teacher, dict) else {}
    models = [_files_digest(path) for path in (model.get("student"), teacher.get("path")) if isinstance(path, str)]
    text = json.dumps([kept, rollouts, models], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


@lru_cache
def _files_digest(path: str) -> str:
    """Of the models' weights, config and tokenizer; the name itself when it is no local folder.

    The fingerprint in checkpoints (`teacher.fingerprint`) does for large models; this one loads no torch.
    """
    folder = Path(find(path)).expanduser()
    if not folder.is_dir():
        return path
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _nested(setting: str, value: Any) -> dict[str, Any]:
    """`a.b: value` as a mapping in a mapping."""
    *outer, last = setting.split(".")
    nested = {last: value}
    for key in reversed(outer):
        nested = {key: nested}
    return nested


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
