"""Truncated importance weights of rows that another engine sampled: values, gradients, and what they make unbiased."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import Objective, PolicyOutput, importance
from kdrl_pl.losses.distillation import Distillation
from kdrl_pl.losses.policy_gradient import PolicyGradient

RESPONSES = [2, 3, 1]
LOGPROBS = [[-0.5, -1.0], [-2.0, -0.3, -0.7], [-1.5]]
OLD_MINUS_BEHAVIOR = [[0.2, -0.4], [1.5, 0.0, -3.0], [0.69]]  # one far above the cap of 2, one just below it
LOG_RATIOS = [[0.1, -0.3], [0.4, 0.0, -0.1], [0.05]]
TEACHER = [[-0.9, -0.2], [-0.1, -4.0, -0.7], [-1.0]]
ADVANTAGES, WEIGHTS, KD_WEIGHTS = [1.0, -0.7, 0.4], [0.2, 0.5, 0.1], [0.3, 0.0, 0.6]
WIDTH = 4  # one prompt token, up to three of response


def table(rows: list[list[float]]) -> Tensor:
    """(B, T) of the numbers on the response tokens, garbage elsewhere."""
    cycle = itertools.cycle([math.nan, math.inf, -math.inf])
    values = torch.tensor([[next(cycle) for _ in range(WIDTH)] for _ in rows], dtype=torch.float64)
    for i, row in enumerate(rows):
        values[i, 1 : 1 + len(row)] = torch.tensor(row, dtype=torch.float64)
    return values


def minus(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[x - y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def make_experience(reused: bool) -> Experience:
    e = Experience.from_rows([[1]] * 3, [[2] * n for n in RESPONSES], [0.0] * 3, [0] * 3)
    e.advantages, e.token_weights = (torch.tensor(x, dtype=torch.float64) for x in (ADVANTAGES, WEIGHTS))
    e.kd_weights = torch.tensor(KD_WEIGHTS, dtype=torch.float64)[:, None] * e.response_mask
    e.teacher_logprobs = table(TEACHER)
    old = minus(LOGPROBS, LOG_RATIOS) if reused else LOGPROBS
    e.old_logprobs = table(old) if reused else None
    e.behavior_logprobs = table(minus(old, OLD_MINUS_BEHAVIOR))
    return e


@pytest.mark.parametrize("reused", [False, True], ids=["one update", "reused"])
@pytest.mark.parametrize("cap", [None, 2.0, 1.0, 1e9])
def test_weights_scale_both_sampled_terms(cap: float | None, reused: bool) -> None:
    # Red: a weight with gradient, current for old log-probs in it, no cap or one on the wrong side, a term left out.
    objective = Objective({"pg": PolicyGradient(1.3, 0.9, 9.0), "kd": Distillation(0.4)}, cap)
    logprobs = table(LOGPROBS).nan_to_num(0.0, 0.0, 0.0).requires_grad_()
    output = objective(PolicyOutput(logprobs), make_experience(reused), 0)
    output.loss.backward()
    loss, gradient, weights = 0.0, torch.zeros(3, WIDTH, dtype=torch.float64), []
    for i, j in [(row, token) for row in range(3) for token in range(RESPONSES[row])]:
        v = 1.0 if cap is None else min(math.exp(OLD_MINUS_BEHAVIOR[i][j]), cap)
        ratio = math.exp(LOG_RATIOS[i][j]) if reused else 1.0
        d = TEACHER[i][j] - LOGPROBS[i][j]
        value = -v * ratio * (1.3 * WEIGHTS[i] * ADVANTAGES[i] + 0.4 * KD_WEIGHTS[i] * d)  # inside every clip range
        gradient[i, 1 + j] = value
        loss += value
        weights.append(v)
    assert output.loss.item() == pytest.approx(loss, rel=1e-9)
    assert (logprobs.grad - gradient).norm() <= 1e-9 * gradient.norm()
    if cap is None:
        assert "train/importance_weight" not in output.metrics
    else:
        total, count = output.metrics["train/importance_weight"]
        assert (total.item(), count.item()) == (pytest.approx(sum(weights)), 6.0)


def test_the_whole_vocabulary_has_no_sampled_token_to_weigh() -> None:
    e, divergence = make_experience(False), torch.ones(3, WIDTH, dtype=torch.float64)
    policy = PolicyOutput(table(LOGPROBS), {"divergence": divergence})
    losses = [Objective({"kd": Distillation(1.0, "full")}, cap)(policy, e, 0).loss.item() for cap in (None, 2.0)]
    assert losses == [pytest.approx(2 * 0.3 + 0.6)] * 2


@pytest.mark.parametrize("estimator", ["k2", "forward_kl"])
def test_what_another_sampler_wrote_has_the_gradient_of_our_own_samples_on_average(estimator: str) -> None:
    # One token per response, every word once, weighted by its chance under the sampler: an exact expectation.
    # Red: the inverse weight, or none.
    words = 4
    generator = torch.Generator().manual_seed(0)
    current, old, behavior, teacher = (
        torch.randn(words, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(4)
    )

    def expected_gradient(sampler: Tensor, cap: float | None) -> Tensor:
        e = Experience.from_rows([[1]] * words, [[2]] * words, [0.0] * words, [0] * words)
        e.advantages = torch.tensor([1.0, -0.5, 0.2, -0.7], dtype=torch.float64)
        e.token_weights = sampler.exp()
        e.kd_weights = torch.stack([torch.zeros(words), sampler.exp()], 1)
        e.old_logprobs, e.behavior_logprobs, e.teacher_logprobs = (
            torch.stack([torch.zeros(words), x], 1) for x in (old, sampler, teacher)
        )
        logits = current.clone().requires_grad_()
        policy = PolicyOutput(torch.stack([torch.zeros(words), logits.log_softmax(0)], 1))
        terms = {"pg": PolicyGradient(1.0, 1.0, 1e3), "kd": Distillation(0.5, estimator)}
        Objective(terms, cap)(policy, e, 0).loss.backward()
        return logits.grad

    ours = expected_gradient(old, None)
    assert (expected_gradient(behavior, 1e9) - ours).norm() <= 1e-9 * ours.norm()
    assert (expected_gradient(behavior, None) - ours).norm() > 0.1 * ours.norm()


def test_a_token_the_sampler_thought_impossible_stays_finite() -> None:
    e = make_experience(False)
    e.behavior_logprobs[0, 1] = -1e30
    assert importance(PolicyOutput(table(LOGPROBS)), e, 2.0)[0, 1].item() == pytest.approx(2.0)


def test_rows_without_behavior_logprobs_are_refused() -> None:
    e = make_experience(False)
    e.behavior_logprobs = None
    with pytest.raises(ValueError, match=r"no behavior_logprobs.*importance_cap: null"):
        Objective({"pg": PolicyGradient()}, 2.0)(PolicyOutput(table(LOGPROBS)), e, 0)


@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
def test_a_cap_that_is_not_positive_is_refused(cap: float) -> None:
    with pytest.raises(ValueError, match="importance_cap is"):
        Objective({"pg": PolicyGradient()}, cap)
