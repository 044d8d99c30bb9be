"""Distillation: literal gradients of the sampled forms (vectors.json, V4), of the whole vocabulary (V5) and of reused
rows (V6)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import Objective, PolicyOutput
from kdrl_pl.losses.distillation import Distillation
from kdrl_pl.losses.transforms import TRANSFORMS, Transform

VECTORS = json.loads((Path(__file__).parents[1] / "vectors.json").read_text())
V4, V5, V6 = (VECTORS[name] for name in ("V4_sampled_estimators", "V5_full_vocabulary", "V6_reused_rows"))
NAMES = ("old", "current", "teacher")


def one_token_rows(teacher: Tensor, weights: Tensor, old: Tensor | None = None) -> Experience:
    """Rows of one prompt and one response token; `teacher`, `old` and `weights` are (B,)."""
    rows = len(teacher)
    experience = Experience.from_rows([[1]] * rows, [[2]] * rows, [0.0] * rows, [0] * rows)
    experience.advantages, experience.token_weights = torch.zeros(rows), weights.float()
    experience.kd_weights = behind_a_prompt(weights)
    experience.teacher_logprobs = behind_a_prompt(teacher)
    if old is not None:
        experience.old_logprobs = behind_a_prompt(old)
    return experience


def behind_a_prompt(values: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(values), values], 1)


def gradient(term: Distillation, policy: PolicyOutput, experience: Experience, of: Tensor) -> list[float]:
    of.grad = None
    Objective({"distillation": term})(policy, experience, 0).loss.backward()
    return of.grad.tolist()


def expected_gradient(term: Distillation, student: list, teacher: list, old: list | None = None) -> list[float]:
    """Gradient in the student's logits of the expected loss of one token: row a is word a, with its probability."""
    logits = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    old_logprobs = None if old is None else torch.tensor(old, dtype=torch.float64).log_softmax(0)
    chance = (logprobs if old_logprobs is None else old_logprobs).detach().exp()
    experience = one_token_rows(torch.tensor(teacher, dtype=torch.float64).log_softmax(0), chance, old_logprobs)
    return gradient(term, PolicyOutput(behind_a_prompt(logprobs)), experience, logits)


@pytest.mark.parametrize("row", V4, ids=lambda row: f"d={row['d']}")
@pytest.mark.parametrize(("estimator", "column"), [("k2", "grad_k2_loss"), ("forward_kl", "grad_k3_loss")])
@pytest.mark.parametrize("reused", [False, True], ids=["one update", "old = current"])
def test_literal_gradients_of_the_sampled_forms(row: dict, estimator: str, column: str, reused: bool) -> None:
    # Red: d not detached; a live ratio in front of a live square or of k3 (the vectors' grad_live_rho_k2_WRONG and
    # grad_rho_k3_onpolicy); k1 as a loss, whose gradient is 1 for every teacher; the sign of d.
    logprobs = torch.tensor([row["logp"]], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach().clone() if reused else None
    experience = one_token_rows(torch.tensor([row["teacher"]]).double(), torch.ones(1), old)
    got = gradient(Distillation(1.0, estimator), PolicyOutput(behind_a_prompt(logprobs)), experience, logprobs)
    assert got == pytest.approx([row[column]], abs=1e-6)


def test_full_vocabulary_value_and_gradient() -> None:
    # Red: forward for reverse KL, a detached p, a sum over the wrong axis.
    logits = torch.tensor([V5["student_logits"]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([V5["teacher_logits"]], dtype=torch.float64).log_softmax(-1)
    divergence = Distillation(1.0, "full").divergence(logits.log_softmax(-1), teacher)  # (1,)
    assert divergence.tolist() == pytest.approx([V5["reverse_kl"]], abs=1e-6)
    got = gradient(
        Distillation(1.0, "full"),
        PolicyOutput(torch.zeros(1, 2).double(), {"divergence": behind_a_prompt(divergence)}),
        one_token_rows(torch.zeros(1), torch.ones(1)),
        logits,
    )
    assert got[0] == pytest.approx(V5["grad_logits_reverse_kl"], abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "column"), [("k2", "expected_grad_k2_loss"), ("forward_kl", "expected_grad_k3_loss")]
)
def test_expected_gradients_of_the_sampled_forms(estimator: str, column: str) -> None:
    # Red: k3's gradient is that of the forward KL, k2's that of the reverse KL, and not the other way round.
    got = expected_gradient(Distillation(1.0, estimator), V5["student_logits"], V5["teacher_logits"])
    assert got == pytest.approx(V5[column], abs=1e-6)
    assert V5["expected_grad_k2_loss"] == V5["grad_logits_reverse_kl"]
    assert V5["expected_grad_k3_loss"] == V5["grad_logits_forward_kl"]


@pytest.mark.parametrize("transform", ["clip", "soft_log", "tanh"])
def test_expected_gradients_under_a_transform(transform: str) -> None:
    # Red: a bound inside the square, a gradient through f(d), a whole vocabulary that ignores the transform or bounds
    # the sum instead of each word.
    c, expected = V5["transform_c"], V5["expected_grad"][transform]
    sampled = Distillation(1.0, "k2", transform=transform, transform_bound=c)
    assert expected_gradient(sampled, V5["student_logits"], V5["teacher_logits"]) == pytest.approx(expected, abs=1e-6)
    logits = torch.tensor([V5["student_logits"]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([V5["teacher_logits"]], dtype=torch.float64).log_softmax(-1)
    full = Distillation(1.0, "full", transform=transform, transform_bound=c)
    full.divergence(logits.log_softmax(-1), teacher).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "bound", "expected"),
    [
        ("none", 1.0, [-9.0, -0.5, 0.0, 0.5, 3.0]),
        ("clip", 2.0, [-2.0, -0.5, 0.0, 0.5, 2.0]),
        ("soft_log", 1.0, [-2.302585, -0.405465, 0.0, 0.405465, 1.386294]),
        ("tanh", 2.0, [-1.999506, -0.489837, 0.0, 0.489837, 1.810297]),  # 2 tanh(d / 2)
    ],
)
def test_transforms(name: str, bound: float, expected: list[float]) -> None:
    # Red: tanh(d) without its bound inside or outside, log(1 + d) without the sign.
    d = torch.tensor([-9.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)
    assert Transform(name, bound)(d).tolist() == pytest.approx(expected, abs=1e-6)


def test_reused_rows() -> None:
    # Red: no ratio (D), d frozen at scoring time (B), a live ratio in front of the square (C).
    got = expected_gradient(Distillation(1.0), V6["current_logits"], V6["teacher_logits"], V6["old_logits"])
    assert got == pytest.approx(V6["exact_grad"], abs=1e-6)
    for wrong in ("B_minus_rho_dold", "C_live_rho_k2", "D_k2_no_ratio"):
        assert got != pytest.approx(V6[wrong], abs=1e-3)


def test_the_ratio_cap_bounds_the_weight_and_keeps_the_gradient() -> None:
    # Red: clamping the ratio, which has no gradient above the cap; a cap from below.
    # rho = 4, 1, 0.5 under cap 2: -min(rho, 2) d with d = -0.5.
    old, ratios = torch.full((3,), -2.0).double(), torch.tensor([4.0, 1.0, 0.5]).double()
    logprobs = (old + ratios.log()).requires_grad_()
    experience = one_token_rows(logprobs.detach() - 0.5, torch.ones(3), old)
    policy = PolicyOutput(behind_a_prompt(logprobs))
    assert gradient(Distillation(1.0, ratio_cap=2.0), policy, experience, logprobs) == pytest.approx([1.0, 0.5, 0.25])


@pytest.mark.parametrize("estimator", ["k2", "forward_kl"])
def test_the_ratio_cap_changes_nothing_below_it(estimator: str) -> None:
    logits = [V6[f"{name}_logits"] for name in ("current", "teacher", "old")]
    plain = expected_gradient(Distillation(1.0, estimator), *logits)
    capped = expected_gradient(Distillation(1.0, estimator, ratio_cap=1.4), *logits)  # the largest ratio is 1.35
    assert capped == pytest.approx(plain, abs=1e-12)


def metrics_of_v6(term: Distillation, masked: int | None = None) -> dict[str, tuple[float, float]]:
    """Metrics on V6, row a sampling word a; `masked` names a row that is not distilled."""
    old, current, teacher = (torch.tensor(V6[f"{n}_logits"]).double().log_softmax(0) for n in NAMES)
    experience = one_token_rows(teacher, torch.full((3,), 0.25), old)
    experience.advantages, experience.token_weights = torch.tensor([1.0, -2.0, 0.0]), torch.full((3,), 0.25)
    if masked is not None:
        experience.kd_weights[masked] = 0.0
        experience.teacher_logprobs[masked] = torch.nan
    metrics = term.metrics(PolicyOutput(behind_a_prompt(current)), experience, 0)
    return {name: (float(total), float(count)) for name, (total, count) in metrics.items()}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_reported_kl_is_neither_transformed_nor_the_loss(transform: str) -> None:
    # Red: k2's own value, a bounded d, no ratio on reused rows.
    # rho (-d) = 0.641105, -0.500423, 0.946517 and rho (e^d - d - 1) = 0.130752, 0.277157, 0.287851.
    metrics = metrics_of_v6(Distillation(0.5, transform=transform, transform_bound=0.1))
    assert metrics["teacher/reverse_kl"] == pytest.approx((1.087199, 3.0), abs=1e-5)
    assert metrics["teacher/reverse_kl_k3"] == pytest.approx((0.695760, 3.0), abs=1e-5)


def test_the_reported_kl_is_unbiased_on_reused_rows() -> None:
    # Red: a value whose average over what old samples is not the KL of the current student.
    old, current, teacher = (torch.tensor(V6[f"{n}_logits"]).double().log_softmax(0) for n in NAMES)
    average = {"teacher/reverse_kl": 0.0, "teacher/reverse_kl_k3": 0.0}
    for word in range(3):
        one = slice(word, word + 1)
        experience = one_token_rows(teacher[one], torch.ones(1), old[one])
        metrics = Distillation(0.5).metrics(PolicyOutput(behind_a_prompt(current[one])), experience, 0)
        for name in average:
            average[name] += float(old[word].exp() * metrics[name][0])
    assert list(average.values()) == pytest.approx([V6["reverse_kl_current"]] * 2, abs=1e-6)


def test_share_of_the_teacher_and_tokens_that_pull_apart() -> None:
    # beta sum w |f(d)| / sum w |A| with beta = 0.5, w = 0.25, d = -0.474942, 0.825058, -0.774942, A = 1, -2, 0:
    # 0.5 * 0.25 * 2.074942 = 0.259368 over 0.25 * 3 = 0.75. Opposite signs in rows 0 and 1 of 3.
    metrics = metrics_of_v6(Distillation(0.5))
    assert metrics["train/kd_to_rl"] == pytest.approx((0.259368, 0.75), abs=1e-5)
    assert metrics["train/sign_conflict"] == (2.0, 3.0)
    # clip(0.5): |f| = 0.474942 + 0.5 + 0.5; red: the untransformed d.
    bounded = metrics_of_v6(Distillation(0.5, transform="clip", transform_bound=0.5))
    assert bounded["train/kd_to_rl"] == pytest.approx((0.5 * 0.25 * 1.474942, 0.75), abs=1e-5)


def test_the_share_of_the_teacher_weighs_what_is_back_propagated() -> None:
    # Red: |d| for the forward KL, whose pull is e^d - 1: 0.378079, 1.282012, 0.539270.
    metrics = metrics_of_v6(Distillation(0.5, "forward_kl"))
    assert metrics["train/kd_to_rl"] == pytest.approx((0.5 * 0.25 * 2.199361, 0.75), abs=1e-5)


def test_tokens_that_are_not_distilled_are_not_reported() -> None:
    # Red: the teacher, never asked for them, answers with whatever lies there (NaN in this test).
    metrics = metrics_of_v6(Distillation(0.5), masked=1)
    assert metrics["teacher/reverse_kl"] == pytest.approx((0.641105 + 0.946517, 2.0), abs=1e-5)
    assert metrics["train/kd_to_rl"] == pytest.approx((0.5 * 0.25 * 1.249884, 0.75), abs=1e-5)
    assert metrics["train/sign_conflict"] == (1.0, 2.0)


def test_rows_with_a_weight_are_active() -> None:
    # Red: activity read off the advantage: a group of equal rewards would not be distilled.
    experience = one_token_rows(torch.zeros(3), torch.tensor([0.1, 0.0, 1e-12]))
    assert Distillation().active(experience).tolist() == [True, False, True]


def test_rows_without_a_distilled_token_need_no_divergence() -> None:
    # Red: mask "group" in a rollout where every group has a correct response: nobody asked the teacher, so there is
    # nothing to multiply the weights with.
    experience = one_token_rows(torch.zeros(2), torch.zeros(2))
    logprobs = torch.zeros(2, 2, requires_grad=True)
    for estimator in ("full", "top_k"):
        objective = Objective({"distillation": Distillation(1.0, estimator, mask="group")})
        loss = objective(PolicyOutput(logprobs), experience, 0).loss
        assert loss.item() == 0.0
        loss.backward()  # an idle rank has a graph as well, or backward raises there and the others wait
    assert not logprobs.grad.any()


def test_the_default_is_the_reverse_kl_with_the_coefficient_of_the_paper() -> None:
    term = Distillation()
    assert (term.estimator, term.mask, term.normaliser, term.transform.name) == ("k2", "none", "all", "none")
    assert (term.coef.value(0), term.ratio_cap, term.reads_vocabulary) == (2e-3, None, False)
    assert Distillation(estimator="full").reads_teacher_vocabulary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "k1"}, "no teacher in its gradient; use k2"),
        ({"estimator": "k3"}, "write forward_kl"),
        ({"estimator": "jsd"}, "k2, forward_kl, full"),
        ({"mask": "correct"}, "none, response, group, negative_advantage"),
        ({"normaliser": "token"}, "all, kept"),
        ({"transform": "sigmoid"}, "none, clip, soft_log, tanh"),
        ({"transform": "clip", "transform_bound": 0.0}, "transform_bound is 0.0"),
        ({"transform": "clip", "transform_bound": math.nan}, "transform_bound is nan"),
        ({"estimator": "forward_kl", "transform": "clip"}, "use estimator k2"),
        ({"ratio_cap": 0.0}, "ratio_cap is 0.0"),
        ({"estimator": "full", "ratio_cap": 2.0}, "ratio_cap is 2.0"),
        ({"coef": math.inf}, "coef is inf"),
    ],
)
def test_unsound_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**arguments)
