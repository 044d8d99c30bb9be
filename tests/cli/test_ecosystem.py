"""What docs/ecosystem.md says of other libraries, where no page runs it: loggers get every number; reasoning-gym."""

from __future__ import annotations

import csv
import importlib.util
import json
import string
from pathlib import Path

import pytest
import yaml

from kdrl_pl.__main__ import main
from kdrl_pl.models.tiny import write_tiny

SMALL = ["--config", "configs/quickstart.yaml", "--config", "configs/debug.yaml", "--run.max_rollouts", "2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_logger_of_the_config_gets_what_metrics_jsonl_has():
    logger = "--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "logs"
    assert main(["fit", *SMALL, "--run.name", "csv", *logger]) == 0
    (ours,), (theirs,) = Path("runs/csv").glob("*/metrics.jsonl"), Path("logs").rglob("metrics.csv")
    written = [row for row in map(json.loads, ours.read_text().splitlines()) if "train/loss" in row]
    with theirs.open() as file:
        logged = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(written) == len(logged) == 2
    for want, row in zip(written, logged, strict=True):
        names = [name for name in want if name.startswith(("train/", "reward/", "rollout/", "teacher/"))]
        assert len(names) > 20
        # Lightning holds what loggers get in float32
        assert {n: float(row[n]) for n in names} == pytest.approx({n: want[n] for n in names}, rel=1e-6)


def test_tensorboard_is_on_by_itself():
    assert main(["fit", *SMALL, "--run.name", "tb"]) == 0
    assert list(Path("runs/tb").glob("*/tensorboard/events.out.tfevents.*"))


@pytest.mark.parametrize(("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_logger_whose_package_is_missing_is_named(logger, package, capsys):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert main(["fit", *SMALL, "--trainer.logger", f"lightning.pytorch.loggers.{logger}"]) == 1
    assert f"pip install -U '{package}" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_on_tasks_of_reasoning_gym(tmp_path):
    characters = "".join(sorted(set(string.printable) - set("\r\x0b\x0c")))
    write_tiny(tmp_path / "student", 64, 1, alphabet=characters)
    options = {"min_digits": 1, "max_digits": 2}
    sums = {"source": "reasoning_gym:chain_sum", "options": options}
    words = {"source": "reasoning_gym:spell_backward", "size": 16, "weight": 0.5}
    settings = {
        "model": {"student": str(tmp_path / "student"), "distillation": None},
        "data": {
            "prompts_per_rollout": 3,
            "max_prompt_tokens": 300,
            "train": {"sums": {**sums, "size": 32}, "words": words},
            "val": {"sums": {**sums, "size": 4}},
        },
        "rollout": {
            "group_size": 2,
            "reward": {"class_path": "kdrl_pl.rewards.TaskReward"},
            "sampling": {"max_tokens": 8},
        },
        "trainer": {"accelerator": "cpu", "logger": False},
        "run": {"name": "gym", "max_rollouts": 1},
    }
    Path("gym.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "gym.yaml"]) == 0
    (rollout,) = Path("runs/gym").glob("*/rollouts/*.jsonl")
    rows = [json.loads(line) for line in rollout.read_text().splitlines()]
    assert sorted(row["uid"].partition("/")[0] for row in rows) == ["sums"] * 4 + ["words"] * 2
