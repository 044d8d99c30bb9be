"""One run of the off-policy baseline: sample the teacher, keep what is right, imitate it, validate.

A study starts it as a process of its own, as it starts `kdrl fit` for the other arms: as many responses, to as many
training prompts, as another arm has rollouts for; one pass over the right ones. What it leaves has the form that
`kdrl fit` leaves (`summary.json`, `metrics.jsonl`, `env.json`), so that a study reads both alike. Seconds are those of
the two processes that sample and imitate, their start included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdrl_pl.cli.configs import read_configs
from kdrl_pl.files import JSONLines, write_json_atomic
from kdrl_pl.summary import build_summary, mean_over_sets


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the run, in `--folder`; parts that an earlier attempt left are made again."""
    parser = argparse.ArgumentParser(prog="python -m kdrl_pl.study.imitation")
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="settings of kdrl sft")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rollouts", type=int, required=True)
    options = parser.parse_args(arguments)
    folder, merged = options.folder / "run", read_configs(options.config)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = [f"--config={file}" for file in options.config]
    (folder / "prompts.yaml").write_text(yaml.safe_dump(_training_prompts(merged, options.rollouts)))
    before = _validate(files, merged["model"]["student"], folder / "before")

    started = time.perf_counter()
    rows = folder / "teacher.jsonl"
    seeds = ["--rollout.seed", str(options.seed), "--data.seed", str(options.seed)]
    place = ["--run.root", str(folder), "--run.name", "sampling"]
    _kdrl("predict", *files, f"--config={folder / 'prompts.yaml'}", "--rollout.policy=teacher", *seeds, *place,
          "--output", str(rows))  # fmt: skip
    sampled = time.perf_counter()
    _kdrl("sft", "--config=configs/sft.yaml", f"--model.student={merged['model']['student']}",
          f"--data.train.teacher.source={rows}", f"--data.seed={options.seed}", "--trainer.max_epochs=1",
          "--run.root", str(folder), "--run.name", "sft", *(f"--{setting}" for setting in options.set))  # fmt: skip
    imitated = time.perf_counter()

    (run,) = (folder / "sft").iterdir()
    _kdrl("export", str(run), "--last", "--output", str(folder / "student"))
    after = _validate(files, str(folder / "student"), folder / "after")
    seconds, tokens = imitated - started, sum(len(row["response_ids"]) for row in JSONLines(rows).read())
    shutil.copy(run / "env.json", folder / "env.json")
    metrics = JSONLines(folder / "metrics.jsonl")
    last = options.rollouts - 1
    metrics.append({"rollout": last, "time/step": seconds, "time/teacher": sampled - started})
    metrics.append({"rollout": last, "validation": 0, "val/avg_at_k": mean_over_sets(after)})
    summary = build_summary(before, after, seconds=seconds, tokens=tokens, rollouts=options.rollouts)
    write_json_atomic(folder / "summary.json", summary)
    rows.unlink()


def _training_prompts(merged: Mapping[str, Any], rollouts: int) -> dict[str, Any]:
    """Overlay: predict on as many training prompts as the other arms see, with as many responses."""
    count = rollouts * merged["data"]["prompts_per_rollout"]
    sets = {
        name: {**config, "size": min(config["size"], count // len(merged["data"]["train"]))}
        for name, config in merged["data"]["train"].items()
    }
    kept = dict.fromkeys(merged["data"].get("predict") or {})  # null takes a set away
    return {
        "data": {"predict": {**kept, **sets}},
        "rollout": {"validation_samples": merged["rollout"]["group_size"]},
    }


def _validate(files: Sequence[str], student: str, folder: Path) -> dict[str, dict[str, float]]:
    """Results of `kdrl validate` on the testbed's validation sets."""
    place = ["--run.root", str(folder.parent), "--run.name", folder.name]
    _kdrl("validate", *files, f"--model.student={student}", "--model.evaluate_kl=false", *place)
    return json.loads(next(folder.glob("*/validation.json")).read_text())


def _kdrl(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "kdrl_pl", *words], check=True)


if __name__ == "__main__":
    main()
