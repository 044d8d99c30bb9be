"""TGPO: the teacher's favourite word at every state, by hand, through a model in float64, and under masks."""

from __future__ import annotations

import pytest
import torch
from one_token import every_word, gradient
from tiny_run import fit, make_module, metrics_rows

from kdrl_pl.experience import Experience
from kdrl_pl.losses import TGPO, Distillation
from kdrl_pl.schedules import Switch

STUDENT = torch.tensor([0.4, 1.9, -0.3, 0.1, -2.0], dtype=torch.float64)
TEACHER = torch.tensor([0.0, 0.5, -1.0, 2.0, -3.0], dtype=torch.float64)  # favours word 3
SAMPLER = torch.tensor([0.5, 0.9, 0.0, -0.4, -1.2], dtype=torch.float64)


def rows() -> Experience:
    """Two groups of two ragged rows in the vocabulary of the tiny models (16 ids)."""
    return Experience.from_rows(
        prompts=[[3, 4, 12], [3, 4, 12], [5, 6, 7, 12], [5, 6, 7, 12]],
        responses=[[8, 9, 1], [2, 3, 4, 5, 1], [6], [7, 7, 8, 1]],
        rewards=[1.0, 0.0, 0.0, 1.0],
        group=[0, 0, 1, 1],
        correct=[True, False, False, True],
        temperature=0.8,
        max_response_tokens=6,
    )


@pytest.mark.parametrize("cap", [None, 2.0], ids=["own samples", "another engine's, weighed"])
def test_value_and_gradient(cap: float | None) -> None:
    # -w log p(3), whatever was sampled: gradient w (p - onehot(3)). Red: the student's favourite, an importance weight
    # on what is no average over samples, the sampled token's log-prob.
    logits = STUDENT.clone().requires_grad_()
    output = every_word({"tgpo": TGPO(0.5)}, logits, TEACHER, sampler=SAMPLER, cap=cap)
    assert output.loss.item() == pytest.approx(-0.5 * STUDENT.log_softmax(0)[3].item(), rel=1e-12)
    expected = 0.5 * (STUDENT.softmax(0) - torch.eye(5, dtype=torch.float64)[3])
    assert (gradient(output, logits) - expected).norm() <= 1e-12 * expected.norm()
    assert output.metrics["teacher/top_k_overlap"][1].item() == 5


def test_stopping_can_be_the_favourite_though_no_stop_token_is() -> None:
    # Words 1 and 2 end a response; apart the teacher favours word 3 (0.36), together they have 0.45.
    teacher = torch.tensor([0.1, 0.25, 0.2, 0.36, 0.09], dtype=torch.float64).log()
    logits = STUDENT.clone().requires_grad_()
    loss = every_word({"tgpo": TGPO(1.0)}, logits, teacher, stops=(1, 2)).loss
    assert loss.item() == pytest.approx(-STUDENT.softmax(0)[1:3].sum().log().item(), rel=1e-12)


def test_the_default_is_the_papers_schedule() -> None:
    coef = TGPO().coef
    assert [coef.value(k) for k in (0, 1, 100, 200, 300)] == pytest.approx([2e-3, 1.99e-3, 1e-3, 0.0, 0.0], abs=1e-15)


@pytest.mark.parametrize("mask", [None, "none", "response"])
def test_gradient_through_the_models(mask: str | None, tiny_models) -> None:
    # Against the models' own logits in float64. Red: rows that a distillation mask hides from the teacher (its hidden
    # states are zero there) used all the same; the shift by one, the temperature, the weights.
    distillation = None if mask is None else Distillation(0.0, mask=mask)
    settings = {"policy_gradient": None, "distillation": distillation, "terms": {"tgpo": TGPO(0.7)}}
    module = make_module(*tiny_models, **settings, normaliser="group").load()
    module.student.double(), module.teacher.model.double()
    experience = module.score(rows(), 0)
    module.loss(experience, 0).loss.backward()
    got = torch.cat([p.grad.flatten() for p in module.student.parameters()])

    with torch.no_grad():
        favourite = module.teacher.model.model(input_ids=experience.input_ids).logits[:, :-1].argmax(-1)
    logprobs = (module.student.model(input_ids=experience.input_ids).logits[:, :-1] / 0.8).log_softmax(-1)
    of_favourite = torch.nn.functional.pad(logprobs.gather(2, favourite[..., None])[..., 0], (1, 0))
    weight = torch.tensor([1 / 16, 1 / 16, 1 / 10, 1 / 10]).double()  # 1 / (2 groups x 8 tokens), 1 / (2 x 5)
    if mask == "response":
        weight[[0, 3]] = 0.0
    module.zero_grad()
    (-0.7 * weight[:, None] * torch.where(experience.response_mask, of_favourite, 0.0)).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in module.student.parameters()])
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_at_coefficient_zero_the_teacher_is_not_asked(tiny_models, tmp_path) -> None:
    terms = {"tgpo": TGPO(Switch(0.1, 0.0, at=1))}
    fit(tmp_path, make_module(*tiny_models, distillation=None, terms=terms), max_rollouts=2)
    first, second = [row for row in metrics_rows(tmp_path) if "train/tgpo_loss" in row]
    assert 0 < first["teacher/top_k_overlap"] <= 1
    assert first["train/tgpo_loss"] > 0
    assert "teacher/top_k_overlap" not in second
    assert second["train/tgpo_loss"] == 0.0
