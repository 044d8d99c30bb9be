"""One GPU: a run in each precision, teacher, adapter; its gradient against the CPU's. `pytest -m gpu tests`."""

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


@pytest.fixture
def two_rollouts(tmp_path, monkeypatch):
    """Runs two rollouts of the quick start; the rows of metrics.jsonl that they left."""
    monkeypatch.chdir(ROOT)

    def run(*overlays, precision="32-true"):
        arguments = ["--config", "configs/quickstart.yaml", "--run.root", str(tmp_path), "--run.max_rollouts", "2"]
        arguments += ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", precision]
        arguments += ["--data.val.addition.size", "16", "--trainer.logger", "false"]
        for overlay in overlays:
            arguments += ["--config", f"configs/{overlay}.yaml"]
        assert main(["fit", *arguments]) == 0  # the sampler check stops the run where the two disagree
        file = next(tmp_path.glob("quickstart/*/metrics.jsonl"))
        rows = [row for row in map(json.loads, file.read_text().splitlines()) if "train/loss" in row]
        assert len(rows) == 2 and all(row["train/grad_norm"] > 0 for row in rows)
        assert all(0 < row["teacher/reverse_kl"] < 2 for row in rows)
        return rows

    return run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("teacher", [None, "8bit", "4bit"])
def test_two_rollouts_train_and_the_sampler_agrees_with_the_trainer(precision, teacher, two_rollouts):
    two_rollouts(*([f"teacher/{teacher}"] if teacher else []), precision=precision)


@pytest.mark.parametrize("overlay", ["adapters/lora", "adapters/qlora", "optim/adamw_8bit", "teacher/offload"])
def test_an_overlay_trains(overlay, two_rollouts):
    two_rollouts(overlay)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_decoding_in_bfloat16_drifts_by_its_rounding(precision, two_rollouts):
    for row in two_rollouts("rollout/bfloat16", precision=precision):
        assert 0 < row["rollout/sampler_drift_mean"] < 0.05
        assert 0.9 < row["train/importance_weight"] < 1.1


def test_an_8_bit_teacher_stands_where_it_is_asked_to():
    # Red: made on the GPU whatever the device, and moved without what bitsandbytes keeps beside its weights.
    rows = Experience.from_rows([[3, 4, 12]] * 2, [[8, 9, 1], [2, 3]], [0.0, 1.0], [0, 0])
    told = []
    for device in ("cpu", "cuda"):
        teacher, experience = FrozenTeacher(TEACHER, quantization="8bit"), rows.to(device)
        teacher.load(device)
        assert {parameter.device.type for parameter in teacher.model.parameters()} == {device}
        teacher.score(experience, experience.response_mask)
        told.append(experience.teacher_logprobs.cpu())
    assert torch.allclose(*told, rtol=0, atol=0.3)
    assert told[0].any()


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
