"""The soak: a long run with faults injected at random ends with the weights of a run without them, and does not grow.

    python tests/soak/soak.py [--rollouts 300] [--faults 24] [--seed 0] [--json FILE]

Real `kdrl fit` processes on tiny models. Twice: with faults of the process alone (SIGTERM, SIGKILL, a disk that is full
for the next checkpoint), compared with a clean run; and with those and faults of the reward (it raises, hangs, returns
NaN), compared with a clean run that is given the rewards recorded by the first. In both, every 37th rollout has a loss
that is NaN. Compared are weights, optimizer and counters of the last checkpoint, bit for bit, and the metrics rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from kdrl_pl.checkpoint import find_checkpoint  # noqa: E402 - a script, started by its path

TESTBED = ROOT / "checkpoints/testbeds/arithmetic"
KINDS = ("SIGTERM", "SIGKILL", "full disk")
FULL_DISK = 200_000  # bytes a file may have: metrics fit, a checkpoint of 3 MB does not


def config(rollouts: int) -> dict[str, Any]:
    """Four prompts, four responses of at most 12 tokens, a checkpoint every five rollouts."""

    def task(size: int) -> dict[str, Any]:
        return {"addition": {"source": "addition", "size": size, "options": {"digits": 3}}}

    return {
        "model": {
            "student": str(TESTBED / "student"),
            "teacher": {"path": str(TESTBED / "teacher")},
            "normaliser": "token",
            "distillation": {"coef": 0.3},
            "terms": {"nan": {"class_path": "soak_parts.NaNNowAndThen"}},
        },
        "data": {"prompts_per_rollout": 4, "train": task(64), "val": task(4)},
        "rollout": {
            "reward": {
                "class_path": "kdrl_pl.rewards.GuardedReward",
                "init_args": {
                    "time_limit": 4.0,
                    "max_failure_rate": 0.6,
                    "reward": {"class_path": "soak_parts.EvenSum"},
                },
            },
            "group_size": 4,
            "validation_samples": 1,
            "sampling": {"max_tokens": 12},
        },
        "trainer": {"accelerator": "cpu", "val_check_interval": 50, "logger": False},
        "run": {"name": "soak", "max_rollouts": rollouts, "keep_rollouts": -1},
        "checkpoint": {"every_n_rollouts": 5},
    }


class Run:
    """One run folder and the processes that work on it, one after the other.

    Args:
        folder: of the run.
        settings: its config.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "soak.yaml").write_text(yaml.safe_dump(settings))
        self.rollouts = settings["run"]["max_rollouts"]
        self.memory: list[tuple[int, float]] = []  # rollouts done, MB

    def start(self, preexec=None) -> subprocess.Popen:
        """Start, or go on from the newest checkpoint."""
        words = ["fit", "--config", str(self.folder / "soak.yaml"), "--run.root", str(self.folder), "--resume", "auto"]
        with (self.folder / "log.txt").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "kdrl_pl", *words, "--allow-import", "soak_parts"],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/soak'}"},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=preexec,
            )

    def done(self) -> int:
        """Rollouts whose metrics are written."""
        return sum(1 for row in self.rows() if "validation" not in row)

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl, a torn last line left out."""
        rows = []
        for file in (self.folder / "soak").glob("*/metrics.jsonl"):
            for line in file.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break
        return rows

    def finish(self, process: subprocess.Popen) -> None:
        """Wait for its end, and watch its memory."""
        while process.poll() is None:
            time.sleep(0.5)
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                fields = dict(line.split(":", 1) for line in status.splitlines())
                self.memory.append((self.done(), int(fields["VmRSS"].split()[0]) / 1000))
            except (OSError, KeyError):  # it has ended
                pass
        if process.returncode:
            raise SystemExit(f"status {process.returncode}; see {self.folder / 'log.txt'}")

    def end(self) -> dict[str, Any]:
        """What must be equal."""
        (run,) = (path for path in (self.folder / "soak").iterdir() if (path / "summary.json").exists())
        checkpoint = torch.load(find_checkpoint(run), weights_only=True)
        quiet = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "perf/", "reward/"))} for row in self.rows()
        ]
        return {**{k: checkpoint[k] for k in ("state_dict", "optimizer_states", "kdrl")}, "metrics": quiet}


def small_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK, FULL_DISK))


def with_faults(run: Run, faults: int, draw: random.Random) -> dict[str, int]:
    """Run to the end, with so many faults on the way; returns how many there were of each kind."""
    counts = dict.fromkeys(KINDS, 0)
    for number in range(faults):
        kind = KINDS[number % len(KINDS)]
        before, wanted = run.done(), run.rollouts * (number + 1) // (faults + 1)
        process = run.start(small_disk if kind == "full disk" else None)
        if kind == "full disk":
            process.wait()
            expected = 1
        else:
            expected = 143 if kind == "SIGTERM" else -signal.SIGKILL
            until = max(wanted, before + 1)
            while process.poll() is None and run.done() < until:
                time.sleep(0.01)
            time.sleep(draw.random() * 0.3)  # anywhere in a rollout, an update or a save
            process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            process.wait()
        if process.returncode == 0:
            raise SystemExit(f"the run ended before fault {number + 1} of {faults}; give it more rollouts")
        if process.returncode != expected:
            raise SystemExit(f"{kind}: status {process.returncode}, not {expected}; see {run.folder / 'log.txt'}")
        counts[kind] += 1
    run.finish(run.start())
    return counts


def difference(a: Any, b: Any, name: str = "") -> str | None:
    """The first place where two nested states differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((found for k in a if (found := difference(a[k], b[k], f"{name}/{k}"))), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next((found for i, (x, y) in pairs if (found := difference(x, y, f"{name}/{i}"))), None)
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return None if same else f"{name}: {str(a)[:200]} is not {str(b)[:200]}"


def soak(folder: Path, rollouts: int, faults: int, seed: int) -> dict[str, Any]:
    """Both halves; raises SystemExit where a promise does not hold."""
    draw, report = random.Random(seed), {"rollouts": rollouts}
    for name, faulty in (("process faults", False), ("process and reward faults", True)):
        settings = config(rollouts)
        guarded = settings["rollout"]["reward"]["init_args"]
        if faulty:
            guarded["reward"]["init_args"] = {"faulty": True}
        run = Run(folder / name.replace(" ", "-"), settings)
        counts: dict[str, int] = with_faults(run, faults, draw)
        if faulty:
            (rows,) = (run.folder / "soak").glob("*/rollouts")
            guarded["reward"] = {"class_path": "soak_parts.Recorded", "init_args": {"rollouts": str(rows)}}
        clean = Run(folder / f"clean-{name.replace(' ', '-')}", settings)
        clean.finish(clean.start())
        failed = [row.get("reward/errors", 0.0) for row in run.rows() if "validation" not in row]
        of_run, of_clean = run.end(), clean.end()
        if faulty:
            for state in (of_run, of_clean):  # a reward that is recorded does not fail
                state["metrics"] = [row for row in state["metrics"] if "validation" not in row]
        if found := difference(of_run, of_clean):
            raise SystemExit(f"{name}: {found}")
        report[name] = {
            **counts,
            "rollouts with a failed reward": sum(share > 0 for share in failed),
            "skipped steps": of_run["kdrl"]["skipped_steps"],
            "equal": True,
        }
        report["memory"] = memory(clean.memory, rollouts)
    return report


def memory(samples: list[tuple[int, float]], rollouts: int) -> dict[str, float]:
    """MB resident in the second sixth of a run and in its last."""

    def around(low: float, high: float) -> float:
        return median(mb for done, mb in samples if low * rollouts <= done <= high * rollouts)

    early, late = around(1 / 6, 2 / 6), around(5 / 6, 1)
    if late > 1.05 * early:
        raise SystemExit(f"memory grew from {early:.0f} to {late:.0f} MB")
    return {"early MB": round(early, 1), "late MB": round(late, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=300)
    parser.add_argument("--faults", type=int, default=24, help="of the process, in each half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), options.rollouts, options.faults, options.seed)
    report["seconds"] = round(time.monotonic() - started)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
