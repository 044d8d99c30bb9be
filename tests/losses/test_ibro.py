"""IBRO: value and gradient against autograd over the formula in float64, and what it does in a run."""

from __future__ import annotations

import pytest
import torch
from one_token import every_word, gradient
from tiny_run import fit, make_module, metrics_rows

from kdrl_pl.experience import Experience
from kdrl_pl.losses import IBRO, Distillation
from kdrl_pl.schedules import Linear

STUDENT = torch.tensor([0.4, 1.9, -0.3, 0.1, -2.0], dtype=torch.float64)
OLD = torch.tensor([0.1, 1.2, 0.3, 0.0, -1.0], dtype=torch.float64)
SAMPLER = torch.tensor([0.5, 0.9, 0.0, -0.4, -1.2], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.5, -0.2, 0.7, 0.0, -2.0], dtype=torch.float64)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(0)
    return -(p * p.log()).sum()


@pytest.mark.parametrize("old", [None, OLD], ids=["one update", "reused"])
def test_value_and_gradient(old: torch.Tensor | None) -> None:
    # -c E[A] H with gradient through H alone; red: a score-function gradient, an entropy without gradient, the sign.
    logits, again = (STUDENT.clone().requires_grad_() for _ in range(2))
    output = every_word({"ibro": IBRO(0.3)}, logits, STUDENT, old=old, advantages=ADVANTAGES)
    mean = ((STUDENT if old is None else old).softmax(0) * ADVANTAGES).sum()
    expected = -0.3 * mean * entropy(again)
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (gradient(output, logits) - again.grad).norm() <= 1e-12 * again.grad.norm()


def test_a_good_token_raises_the_entropy_and_a_bad_one_lowers_it() -> None:
    for advantage in (1.0, -1.0):
        logits = STUDENT.clone().requires_grad_()
        output = every_word({"ibro": IBRO(1.0)}, logits, STUDENT, advantages=torch.full((5,), advantage).double())
        after = STUDENT - 0.01 * gradient(output, logits)
        assert (entropy(after) - entropy(STUDENT)) * advantage > 0


def test_importance_weights_make_it_the_mean_over_our_own_samples() -> None:
    # The advantage is that of the sampled token, so v belongs to it.
    gradients = []
    for sampler, cap in ((OLD, None), (SAMPLER, 1e9)):
        logits = STUDENT.clone().requires_grad_()
        terms = {"ibro": IBRO(1.0)}
        output = every_word(terms, logits, STUDENT, old=OLD, sampler=sampler, cap=cap, advantages=ADVANTAGES)
        gradients.append(gradient(output, logits))
    assert (gradients[0] - gradients[1]).norm() <= 1e-12 * gradients[0].norm()


def test_beside_a_stop_cell_the_entropy_is_that_of_the_tokens() -> None:
    # Red: the merged vocabulary, which has less entropy, read by a term of reinforcement learning.
    terms = {"ibro": IBRO(1.0), "kd": Distillation(0.0, "full")}
    logits = STUDENT.clone().requires_grad_()
    metrics = every_word(terms, logits, STUDENT, stops=(1, 2), advantages=ADVANTAGES).metrics
    total, count = metrics["train/entropy"]
    assert (total / count).item() == pytest.approx(entropy(STUDENT).item(), rel=1e-12)


def test_a_coefficient_of_zero_reads_and_logs_nothing() -> None:
    output = every_word({"ibro": IBRO(0.0)}, STUDENT.clone().requires_grad_(), STUDENT, advantages=ADVANTAGES)
    assert "train/entropy" not in output.metrics
    assert output.loss.item() == 0.0


def test_the_coefficient_has_no_default() -> None:
    with pytest.raises(TypeError, match="coef"):
        IBRO()
    assert IBRO(Linear(1.0, 0.5, 0.0)).coef.value(1) == 0.5


def test_rows_without_advantage_can_be_left_out() -> None:
    e = Experience.from_rows([[1]] * 3, [[2]] * 3, [0.0] * 3, [0] * 3, advantages=[1.0, 0.0, -0.5])
    e.token_weights = torch.tensor([0.5, 0.5, 0.0])
    assert IBRO(1.0).active(e).tolist() == [True, False, False]


def test_in_a_run_the_entropy_is_logged(tiny_models, tmp_path) -> None:
    module = make_module(tiny_models[0], None, policy_gradient=None, terms={"ibro": IBRO(0.1)})
    fit(tmp_path, module, max_rollouts=2)
    rows = [row for row in metrics_rows(tmp_path) if "train/ibro_loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["train/ibro_coef"] == 0.1
        assert 0 < row["train/entropy"] < 2.78  # log 16, the words of the tiny models
        assert row["train/grad_norm"] > 0
