"""`kdrl fit --dry-run` says what would run, refuses what the run would refuse, and leaves nothing."""

from __future__ import annotations

import pytest

from kdrl_pl.__main__ import main
from kdrl_pl.models.language_model import LanguageModel

DEBUG = ["fit", "--dry-run", "--config", "configs/debug.yaml"]


@pytest.fixture
def said(tmp_path, capsys, monkeypatch):
    """What --dry-run says of the debug run with more settings; no weights may be loaded."""

    def no_weights(*args, **kwargs):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr(LanguageModel, "load", no_weights)

    def run(*more: str, status: int = 0) -> str:
        assert main([*DEBUG, "--run.root", str(tmp_path / "runs"), *more]) == status
        assert not (tmp_path / "runs").exists()
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return run


def test_it_says_what_would_run(said) -> None:
    optimizer = ["--model.optimizer.class_path", "torch.optim.SGD", "--model.optimizer.init_args.lr", "0.5"]
    out = said("--model.epochs_per_rollout", "2", "--model.groups_per_update", "2", *optimizer)
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert "student checkpoints/testbeds/arithmetic/student, 283 k parameters, float32" in words
    assert any(line.startswith("teacher checkpoints/testbeds/arithmetic/teacher, 84.3 k parameters") for line in words)
    assert "term distillation, coefficient 0.002, reverse KL, sampled (k2)" in words
    assert "train addition, 64 prompts" in words and "val addition, 16 prompts" in words
    assert "reward TaskReward" in words
    rows = "2 rollouts of 4 prompts x 4 responses = 16 rows of at most 32 tokens (512 tokens a rollout at most)"
    assert f"sampling {rows}" in words
    assert "updates 4 a rollout, 8 in all; SGD, learning rate 0.5 x 1" in words
    assert any(
        line.startswith("validation 16 prompts x 2 responses, before training, every 1 rollouts") for line in words
    )
    assert any("(the longest has 8 tokens)" in line for line in words)


def test_schedules_are_shown_over_the_run(said) -> None:
    """max(5e-3 - 5e-5 k, 1e-3) at rollouts 0, 140 - 1 and 280 - 1."""
    out = said("--config", "configs/arms/kdrl_annealing.yaml", "--run.max_rollouts", "280")
    assert "coefficient 0.005 → 0.001 → 0.001" in out
    out = said("--config", "configs/arms/opd_then_rl.yaml", "--run.max_rollouts", "120")
    assert "reinforcement learning, coefficient 0 → 0 → 1" in out
    out = said("--config", "configs/arms/opd_then_rl_plateau.yaml")
    assert "coefficient 1 until the run decides otherwise" in out


def test_without_a_teacher(said) -> None:
    out = said("--config", "configs/arms/grpo.yaml", "--model.teacher", "null")
    assert "teacher     none\n" in out and "distillation" not in out


def test_what_the_run_would_refuse_is_refused(said) -> None:
    assert "groups_per_update is 3 with 4 prompts" in said("--model.groups_per_update", "3", status=1)
    assert "prompts_per_rollout=128" in said("--data.prompts_per_rollout", "128", status=1)
    reward = ["--rollout.reward.class_path=kdrl_pl.rewards.FunctionReward"]
    reward += ["--rollout.reward.init_args.function=mine.exact"]
    assert "add --allow-import mine" in said(*reward, status=1)
    assert "there is no module 'mine'" in said(*reward, "--allow-import", "mine", status=1)
    gate = ["--model.distillation.mask", "negative_advantage", "--model.distillation.competence.path", "nowhere.jsonl"]
    assert "nowhere.jsonl" in said(*gate, "--model.distillation.competence.at_least", "0.5", status=1)


def test_only_fit_has_one(capsys) -> None:
    assert main(["validate", "--dry-run", "--config", "configs/debug.yaml"]) == 1
    assert "--dry-run is for kdrl fit" in capsys.readouterr().err
