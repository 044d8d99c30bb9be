"""GSPO: value and gradient against the paper's sequence objective in float64: ragged rows, every side of the clip."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import LossOutput, Objective, PolicyOutput
from kdrl_pl.losses.distillation import Distillation
from kdrl_pl.losses.gspo import GSPO
from kdrl_pl.losses.policy_gradient import PolicyGradient
from kdrl_pl.losses.weights import experience_weights
from kdrl_pl.module import KDRLModule

LOW, HIGH = 0.1, 0.2
GROUP = [0, 0, 0, 0, 5, 5, 5, 5]
PROMPTS = [1, 2, 3, 1, 2, 1, 1, 2]
ADVANTAGES = [1.5, 0.5, -0.7, -1.3, 1.0, -0.4, -0.6, 0.0]
# mean log-ratios: 0.1 and 0.4 (A > 0: inside, clipped), -0.3 and 0.5 (A < 0: clipped, not), -1.0 (A > 0: not clipped)
LOG_RATIOS = [[0.3, -0.1], [0.4], [-0.9, 0.3, -0.3], [0.7, 0.3], [-1.0], [0.0, 0.01, 0.02, 0.01], [0.0], [0.2, 0.2]]
OLD = [[-1.0 - 0.1 * t for t in range(len(row))] for row in LOG_RATIOS]
CLIPPED = [False, True, True, False, False, False, False, False]


def rows_of(reused: bool = True) -> tuple[PolicyOutput, Experience, Tensor]:
    """Policy and experience, and the leaf (B, T) that their gradient arrives in."""
    experience = Experience.from_rows(
        [[1] * n for n in PROMPTS],
        [[2] * len(row) for row in LOG_RATIOS],
        [0.0] * 8,
        GROUP,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64),
    )
    experience_weights(experience, [torch.arange(8)], "sequence", Distillation(), lambda totals: totals)
    experience.token_weights = 1 / (8 * experience.response_lengths.double())
    table = torch.full(experience.input_ids.shape, math.nan, dtype=torch.float64)
    old = table.clone()
    for i, (prompt, row) in enumerate(zip(PROMPTS, LOG_RATIOS, strict=True)):
        old[i, prompt : prompt + len(row)] = torch.tensor(OLD[i], dtype=torch.float64)
        table[i, prompt : prompt + len(row)] = torch.tensor(row, dtype=torch.float64)
    leaf = (old + table).requires_grad_()
    experience.old_logprobs = old if reused else None
    return PolicyOutput(leaf), experience, leaf


def reference(reused: bool) -> tuple[float, list[list[float]]]:
    """`-(1/B) sum min(s A, clip(s) A)`, and its derivative in the log-prob of each token: `-s A / (B |o|)` or 0."""
    value, slopes = 0.0, []
    for advantage, row, clipped in zip(ADVANTAGES, LOG_RATIOS, CLIPPED, strict=True):
        s = math.exp(sum(row) / len(row)) if reused else 1.0
        value -= min(s * advantage, min(max(s, 1 - LOW), 1 + HIGH) * advantage) / 8
        slopes.append([0.0 if clipped and reused else -s * advantage / (8 * len(row))] * len(row))
    return value, slopes


@pytest.mark.parametrize("reused", [True, False])
def test_the_sum_over_tokens_is_the_objective_of_the_paper(reused: bool) -> None:
    # Red: token ratios, a sum for the mean of log-ratios, a detached s, padding in the mean, clip bounds swapped.
    policy, experience, leaf = rows_of(reused)
    output: LossOutput = Objective({"pg": GSPO(clip_low=LOW, clip_high=HIGH)})(policy, experience, 0)
    output.loss.backward()
    value, slopes = reference(reused)
    assert output.loss.item() == pytest.approx(value, rel=1e-12)
    for i, (prompt, row) in enumerate(zip(PROMPTS, slopes, strict=True)):
        assert leaf.grad[i, prompt : prompt + len(row)].tolist() == pytest.approx(row, rel=1e-12, abs=1e-15)
    assert not leaf.grad[~experience.response_mask].any()


def test_the_gradient_is_that_of_the_paper_through_shared_weights() -> None:
    # The same by autograd: the paper's formula written as it stands, log-probs that depend on common weights.
    weights = torch.linspace(-0.3, 0.4, 5, dtype=torch.float64, requires_grad=True)
    _, experience, leaf = rows_of()
    features = torch.sin(torch.arange(leaf.numel(), dtype=torch.float64))[:, None] * torch.arange(1, 6)
    shift = (features @ weights).view_as(leaf)
    mask = experience.response_mask
    logprobs = torch.where(mask, leaf.detach(), 0.0) + shift
    s = torch.stack([(logprobs[i] - experience.old_logprobs[i])[mask[i]].mean().exp() for i in range(8)])
    a = experience.advantages
    expected = -torch.minimum(s * a, s.clamp(1 - LOW, 1 + HIGH) * a).mean()
    (gradient,) = torch.autograd.grad(expected, weights, retain_graph=True)
    output = Objective({"pg": GSPO(clip_low=LOW, clip_high=HIGH)})(PolicyOutput(logprobs), experience, 0)
    (ours,) = torch.autograd.grad(output.loss, weights)
    assert (ours - gradient).norm() <= 1e-12 * gradient.norm()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_distillation_term_keeps_its_token_ratio() -> None:
    # Red: s in the place of rho in the other term: its gradient would be the same on every token of a row.
    policy, experience, leaf = rows_of()
    experience.teacher_logprobs = torch.where(experience.response_mask, -2.0, 0.0).double()
    alone = Objective({"kd": Distillation(0.3)})(policy, experience, 0).parts["kd"]
    both = Objective({"pg": GSPO(), "kd": Distillation(0.3)})(policy, experience, 0).parts["kd"]
    assert both.item() == alone.item()
    Objective({"kd": Distillation(0.3)})(policy, experience, 0).loss.backward()
    # -0.3 e^0.3 (-2 + 0.7) / (8 * 2) on the first token of the first row
    assert leaf.grad[0, 1].item() == pytest.approx(0.3 * math.exp(0.3) * 1.3 / 16)


def test_all_tokens_of_a_clipped_response_are_counted_as_clipped() -> None:
    # Rows 1 and 2 of 1 and 3 tokens are clipped, of 16 tokens in all.
    policy, experience, _ = rows_of()
    metrics = GSPO(clip_low=LOW, clip_high=HIGH).metrics(policy, experience, 0)
    assert [float(x) for x in metrics["train/clip_fraction"]] == [4.0, 16.0]


def test_the_paper_s_clip_is_the_default() -> None:
    assert (GSPO().clip_low, GSPO().clip_high) == (3e-4, 4e-4)


@pytest.mark.parametrize("normaliser", ["group", "token", "constant"])
def test_other_normalisers_are_refused(normaliser: str) -> None:
    # Red: a token mean of row surrogates, in which long responses count more than in the paper.
    with pytest.raises(ValueError, match=f"normaliser is '{normaliser}', and GSPO .* set model.normaliser: sequence"):
        KDRLModule("student", policy_gradient=GSPO(), distillation=None, normaliser=normaliser)
    KDRLModule("student", policy_gradient=GSPO(), distillation=None, normaliser="sequence")
    KDRLModule("student", policy_gradient=PolicyGradient(), distillation=None, normaliser=normaliser)
