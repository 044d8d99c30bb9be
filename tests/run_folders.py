"""Run folders written by hand, for tests of what reads them: numbers that a reader can redo, texts that mean harm."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml

from kdrl_pl.files import JSONLines, json_line, write_json_atomic

# What a model may write to get out of a page or a terminal; `pwned` is what it would set.
HOSTILE = [
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "</style></pre></title><script>window.pwned=1</script>",
    '"><svg onload=window.pwned=1>',
    "<a href='javascript:window.pwned=1'>x</a>",
    "\x1b[2J\x1b[31mred\x9b31m \x07\x00 \u202egnp.exe\u202c \u2066x\u2069 \ud800",
    "x" * 30_000,
    "<!-- --><![CDATA[ ]]> &lt; &#60;script&#62;",
]


def config(**model) -> dict:
    """Settings of a run as `kdrl fit` writes them, much shortened."""
    distillation = {"coef": 0.5, "estimator": "k2", "mask": "none", "transform": "none", "transform_bound": 1.0}
    return {
        "seed_everything": 0,
        "trainer": {"accelerator": "cpu", "max_epochs": -1, "default_root_dir": "/somewhere"},
        "model": {
            "student": "checkpoints/testbeds/arithmetic/student",
            "teacher": {"class_path": "kdrl_pl.FrozenTeacher", "init_args": {"path": "teacher", "dtype": "float32"}},
            "policy_gradient": {"class_path": "kdrl_pl.PolicyGradient", "init_args": {"coef": 1.0, "clip_low": 0.2}},
            "distillation": {"class_path": "kdrl_pl.Distillation", "init_args": distillation},
            "normaliser": "token",
            **model,
        },
        "data": {"train": {"sums": {"source": "addition", "size": 8, "weight": 1.0}}, "prompts_per_rollout": 2},
        "run": {"name": "made", "root": "runs", "keep_rollouts": 5, "max_rollouts": 4},
        "rollout": {"group_size": 2, "validation_samples": 4, "sampling": {"temperature": 1.0, "max_tokens": 8}},
    }


def stored_row(rollout: int, number: int = 0, completion: str = "0579", **changes) -> dict:
    """A row of rollouts/: three tokens, of which the teacher likes the second by 2 nats less."""
    return {
        "rollout": rollout,
        "uid": f"sums/{number}",
        "group": number,
        "prompt": "123+456=",
        "completion": completion,
        "reward": 1.0,
        "parts": {},
        "correct": True,
        "truncated": False,
        "advantage": 0.75,
        "prompt_ids": [3, 4],
        "response_ids": [5, 6, 7],
        "behavior_logprobs": [-0.25, -0.5, -1.0],
        "old_logprobs": None,
        "teacher_logprobs": [-0.25, -2.5, -0.5],
        "token_weight": 0.125,
        "kd_weights": [0.125, 0.25, 0.125],
        **changes,
    }


def metrics_row(k: int) -> dict:
    """Rollout k of a run: correct rises by 10 points per rollout, KL falls."""
    return {
        "rollout": k,
        "global_step": k + 1,
        "reward/mean": 0.1 * (k + 1),
        "reward/correct": 0.1 * (k + 1),
        "rollout/length": 20.0 + k,
        "rollout/truncated": 0.0,
        "rollout/entropy": 0.5,
        "rollout/groups_no_signal": 0.25,
        "teacher/reverse_kl": 1 / (k + 1),
        "train/grad_norm": 1.0 + math.sin(k) / 2,
        "train/kd_coef": 0.5,
        "train/pg_coef": 1.0,
        "train/loss": 0.3,
        "time/rollout": 1.0,
        "time/teacher": 0.5,
        "time/update": 2.0,
        "time/step": 4.0,
    }


def write_run(
    folder: Path, rollouts: int = 4, texts: list[str] | None = None, finished: bool = True, settings: dict | None = None
) -> Path:
    """A run of that many rollouts, validated half-way and at its end; `texts` are the responses that are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or config(), sort_keys=False))
    metrics = JSONLines(folder / "metrics.jsonl")
    validated = 0
    rows = []
    for k in range(rollouts):
        rows.append(metrics_row(k))
        if k + 1 in (rollouts // 2, rollouts):
            share = 0.25 + 0.25 * (k + 1) / rollouts
            values = {
                "avg_at_k": share,
                "pass_at_4": share + 0.125,
                "length": 21.0,
                "truncated": 0.0,
                "kl_teacher": 0.5,
            }
            rows.append(
                {"rollout": k, "validation": validated, "val/avg_at_k": share}
                | {f"val/sums/{name}": value for name, value in values.items()}
            )
            validated += 1
    if rows:
        metrics.append(*rows)
    texts = ["0579", "0580"] if texts is None else texts
    (folder / "rollouts").mkdir(exist_ok=True)
    for k in range(max(rollouts - 2, 0), rollouts):
        stored = [stored_row(k, i, text, correct=i % 2 == 0, reward=float(i % 2 == 0)) for i, text in enumerate(texts)]
        (folder / "rollouts" / f"{k:06d}.jsonl").write_bytes(b"".join(map(json_line, stored)))
    before = {"sums": {"avg_at_k": 0.25, "pass_at_4": 0.375, "length": 20.0, "truncated": 0.0, "kl_teacher": 1.5}}
    (folder / "validation").mkdir(exist_ok=True)
    for done in {0, rollouts}:
        sample = [stored_row(-1, i, f"{text}{done}", correct=done > 0, token_weight=None, kd_weights=None)
                  for i, text in enumerate(texts)]  # fmt: skip
        content = {"rollouts": done, "results": before, "rows": sample}
        (folder / "validation" / f"{done:06d}.json").write_bytes(json_line(content))
    environment = {"python": "3.11.7", "packages": {"torch": "2.13.0", "vllm": None}, "platform": "Linux",
                   "cpu": {"name": "CPU", "count": 2, "torch_threads": 1}, "devices": [], "git": None}  # fmt: skip
    write_json_atomic(folder / "env.json", environment)
    if finished:
        after = {"sums": {"avg_at_k": 0.5, "pass_at_4": 0.625, "length": 21.0, "truncated": 0.0, "kl_teacher": 0.5}}
        summary = {"val": {"before": before, "after": after}, "seconds": 16.0, "tokens": 4000, "rollouts": rollouts}
        write_json_atomic(folder / "summary.json", summary)
    return folder


def write_long_run(folder: Path, rollouts: int = 1000) -> Path:
    """A run with every metric that a page draws, noisy, and long responses."""
    from kdrl_pl.report.figures import FIGURES

    texts = ["".join(f"{i * k} + " for k in range(500)) for i in range(1, 13)]
    write_run(folder, rollouts=rollouts, texts=texts)
    names = [name for figure in FIGURES for name in figure.metrics]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for k, row in enumerate(rows):
        if "validation" not in row:
            row |= {name: 0.5 + 0.4 * math.sin(k * (i + 2) * 0.37) for i, name in enumerate(names)}
    (folder / "metrics.jsonl").write_bytes(b"".join(map(json_line, rows)))
    for file in (folder / "rollouts").iterdir():
        stored = [json.loads(line) for line in file.read_text().splitlines()]
        for row in stored:
            length = 2000
            row["response_ids"] = [5, 6] * (length // 2)
            row["behavior_logprobs"] = [-0.123456, -1.23456] * (length // 2)
            row["teacher_logprobs"] = [-1.23456, -0.0123456, -2.34567, -9.87654] * (length // 4)
            row["kd_weights"] = [0.125] * length
        file.write_bytes(b"".join(map(json_line, stored)))
    return folder
