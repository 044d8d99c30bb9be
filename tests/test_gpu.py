"""One GPU: a run in each precision and teacher, and its gradient against the CPU's. `pytest -m gpu tests`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdrl_pl.__main__ import main
from kdrl_pl.experience import Experience
from kdrl_pl.losses import Distillation
from kdrl_pl.module import KDRLModule
from kdrl_pl.teacher import FrozenTeacher

ROOT = Path(__file__).resolve().parents[1]
STUDENT, TEACHER = (
    str(ROOT / "checkpoints/testbeds/arithmetic/student"),
    str(ROOT / "checkpoints/testbeds/arithmetic/teacher"),
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("teacher", [None, "8bit", "4bit"])
def test_two_rollouts_train_and_the_sampler_agrees_with_the_trainer(precision, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["--config", "configs/quickstart.yaml", "--run.root", str(tmp_path), "--run.max_rollouts", "2"]
    arguments += ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", precision]
    arguments += ["--data.val.addition.size", "16", "--trainer.logger", "false"]
    if teacher:
        arguments += ["--config", f"configs/teacher/{teacher}.yaml"]
    assert main(["fit", *arguments]) == 0  # the sampler check stops the run where the two disagree
    rows = [json.loads(line) for line in next(tmp_path.glob("quickstart/*/metrics.jsonl")).read_text().splitlines()]
    assert all(row["train/grad_norm"] > 0 for row in rows if "train/grad_norm" in row)
    assert all(0 < row["teacher/reverse_kl"] < 2 for row in rows if "teacher/reverse_kl" in row)


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_the_gradient_is_that_of_the_cpu(estimator):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 9, 3, 12]
    prompts = [torch.randint(2, 16, (4,), generator=generator).tolist() for _ in lengths]
    responses = [torch.randint(2, 16, (n,), generator=generator).tolist() for n in lengths]
    gradients = []
    for device in ("cpu", "cuda"):
        module = KDRLModule(STUDENT, FrozenTeacher(TEACHER), distillation=Distillation(0.3, estimator)).load(device)
        rows = Experience.from_rows(prompts, responses, [1.0, 0.0, 0.5, 0.2], [0, 0, 1, 1]).to(device)
        module.loss(module.score(rows)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().cpu().double() for p in module.student.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()
