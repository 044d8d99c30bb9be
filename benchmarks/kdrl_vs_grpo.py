"""What the teacher costs in the quick start: a KDRL step against a GRPO step on the same rollouts.

    python benchmarks/kdrl_vs_grpo.py [--repeats 3] [--output FILE]

The learning rate is 0, so that both train on the very same samples; `kdrl fit` runs as a user starts it, in fresh
processes that take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.markdown import kdrl_vs_grpo_table
from common.processes import save, spread

ROOT = Path(__file__).resolve().parents[1]
ARMS: dict[str, list[str]] = {"KDRL": [], "GRPO": ["--config", str(ROOT / "configs/arms/grpo.yaml")]}
PHASES = ("step", "rollout", "reward", "score", "teacher", "update")


def run(arm: str, rollouts: int, small: bool) -> dict[str, float]:
    """Phase -> median seconds over the rollouts but the first two."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kdrl_pl", "fit", "--config", str(ROOT / "configs/quickstart.yaml")]
        command += [*ARMS[arm], f"--run.root={folder}", f"--run.max_rollouts={rollouts}", "--trainer.logger=false"]
        command += ["--model.optimizer.init_args.lr=0", "--data.val=null"]
        command += ["--data.prompts_per_rollout=4"] if small else []
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if ran.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr[-4000:]}")
        lines = next(Path(folder).glob("*/*/metrics.jsonl")).read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "time/update" in row][2:]
    return {phase: statistics.median(row.get(f"time/{phase}", 0.0) for row in rows) for phase in PHASES}


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, to see that it works")
    options = parser.parse_args(arguments)
    from common.machine import description

    rollouts = 3 if options.miniature else options.rollouts
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(options.repeats):
        for arm in ARMS:
            runs[arm].append(run(arm, rollouts, options.miniature))
    report: dict[str, Any] = {
        "machine": description(),
        **{arm: {phase: spread([r[phase] for r in results]) for phase in PHASES} for arm, results in runs.items()},
        "ratio": spread([k["step"] / g["step"] for k, g in zip(runs["KDRL"], runs["GRPO"], strict=True)]),
    }
    save(report, options.output)
    print(kdrl_vs_grpo_table(report))


if __name__ == "__main__":
    main()
