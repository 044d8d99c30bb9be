"""Top-K of the student: by enumeration of the sampled token its gradient is the full one's, for every K."""

from __future__ import annotations

import pytest
import torch
from one_token import every_word, gradient
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.losses import Distillation, Objective, PolicyGradient, PolicyOutput

STUDENT = [0.4, 1.9, -0.3, 0.1, -2.0, 1.2]  # likeliest first: words 1, 5, 0, 3, 2, 4
TEACHER = [1.0, -1.5, 0.2, 2.2, -0.5, 1.3]
OLD = [0.1, 1.2, 0.3, 0.0, -1.0, 1.6]
SAMPLER = [0.5, 0.9, 0.0, -0.4, -1.2, 1.1]
WORDS = len(STUDENT)


def table(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def leaf() -> Tensor:
    return table(STUDENT).requires_grad_()


def bounded(d: Tensor, transform: str) -> Tensor:
    """The transforms at a bound of 0.5, written once more."""
    return {
        "none": d,
        "clip": torch.where(d > 0.5, 0.5, torch.where(d < -0.5, -0.5, d)),
        "soft_log": torch.where(d > 0, (1 + d.abs()).log(), -(1 + d.abs()).log()),
        "tanh": 0.5 * (1 - 2 / ((2 * d / 0.5).exp() + 1)),
    }[transform]


def true_gradient(transform: str) -> Tensor:
    """`-sum_v p f(d) grad log p`, over all words; for "none" the gradient of the reverse KL."""
    logits = leaf()
    logprobs = logits.log_softmax(0)
    d = (table(TEACHER).log_softmax(0) - logprobs).detach()
    (-logprobs.detach().exp() * bounded(d, transform) * logprobs).sum().backward()
    return logits.grad


def term(k: int, transform: str = "none", **settings) -> dict:
    return {"kd": Distillation(1.0, "top_k", transform=transform, transform_bound=0.5, top_k=k, **settings)}


@pytest.mark.parametrize("old", [None, OLD], ids=["one update", "reused"])
@pytest.mark.parametrize("transform", ["none", "clip", "soft_log", "tanh"])
@pytest.mark.parametrize("k", [*range(1, WORDS + 1), 32])
def test_the_expected_gradient_is_the_full_one_for_every_k(k: int, transform: str, old: list | None) -> None:
    # Red: a renormalised sum, the sampled part on words of K too, no ratio on it or one on K, a live p f(d), a bound of
    # the sum, K of the teacher in one place and of the student in the other.
    logits, expected = leaf(), true_gradient(transform)
    got = gradient(every_word(term(k, transform), logits, table(TEACHER), old=old and table(old)), logits)
    assert (got - expected).norm() <= 1e-12 * expected.norm()


def test_the_reference_is_the_reverse_kl() -> None:
    logits = leaf()
    p, q = logits.softmax(0), table(TEACHER).softmax(0)
    (p * (p / q).log()).sum().backward()
    assert (logits.grad - true_gradient("none")).norm() <= 1e-12 * logits.grad.norm()


@pytest.mark.parametrize("k", [1, 3, WORDS])
def test_the_expected_value_is_the_kl(k: int) -> None:
    p, q = table(STUDENT).softmax(0), table(TEACHER).softmax(0)
    loss = every_word(term(k), leaf(), table(TEACHER)).loss.item()
    assert loss == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12)


def test_words_of_k_have_no_noise_and_the_others_little() -> None:
    # Row by row: whatever word of K was sampled, the gradient is the same; red: the sampled part on all words.
    rows = []
    for word in range(WORDS):
        logits = leaf()
        logprobs, of_teacher = logits.log_softmax(0), table(TEACHER).log_softmax(0)
        read = Objective(term(3)).reader(0, True)
        readings = read(Vocabulary(logprobs[None], torch.tensor([word]), of_teacher[None]))
        e = Experience.from_rows([[0]], [[word]], [0.0], [0])
        e.kd_weights = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        e.teacher_logprobs = torch.stack([of_teacher[word]] * 2)[None]
        policy = PolicyOutput(logprobs[word].expand(1, 2), {name: x.expand(1, 2) for name, x in readings.items()})
        per_token = term(3)["kd"](policy, e, 0)[0, 1]
        rows.append(torch.autograd.grad(per_token, logits)[0])
    inside, outside = (1, 5, 0), (3, 2, 4)
    assert all(torch.allclose(rows[word], rows[1], atol=1e-14) for word in inside)
    assert all((rows[word] - rows[1]).norm() > 0.1 for word in outside)


@pytest.mark.parametrize("k", [1, 3, WORDS])
def test_importance_weighs_the_sampled_part_only(k: int) -> None:
    # What another sampler wrote has the gradient of our own samples on average; red: v on the sum over K, or nowhere.
    logits, expected = leaf(), true_gradient("none")
    arguments = (term(k), logits, table(TEACHER))
    got = gradient(every_word(*arguments, old=table(OLD), sampler=table(SAMPLER), cap=1e9), logits)
    assert (got - expected).norm() <= 1e-12 * expected.norm()
    if k < WORDS:
        bare = gradient(every_word(*arguments, old=table(OLD), sampler=table(SAMPLER)), logits)
        assert (bare - expected).norm() > 0.01 * expected.norm()


def test_the_ratio_cap_bounds_the_sampled_part() -> None:
    # Ratios beyond K = 3 lie between 0.2 and 1: a cap of 0.1 scales each to 0.1, and K stays.
    logits = leaf()
    got = gradient(every_word(term(3, ratio_cap=0.1), logits, table(TEACHER), old=table(OLD)), logits)
    logprobs = logits.log_softmax(0)
    p, p_old = logprobs.detach().exp(), table(OLD).softmax(0)
    d = (table(TEACHER).log_softmax(0) - logprobs).detach()
    beyond = [3, 2, 4]
    assert ((p / p_old)[beyond] > 0.1).all()
    weight = torch.where(torch.isin(torch.arange(WORDS), torch.tensor(beyond)), 0.1 * p_old, p)
    (expected,) = torch.autograd.grad(-(weight * d * logprobs).sum(), logits)
    assert (got - expected).norm() <= 1e-12 * expected.norm()


def test_covered_mass_and_overlap_are_logged() -> None:
    # p of words 1, 5, 0: e^1.9, e^1.2, e^0.4 over the sum of all six.
    output = every_word(term(3) | {"pg": PolicyGradient()}, leaf(), table(TEACHER))
    total, count = output.metrics["teacher/top_k_mass"]
    assert count.item() == WORDS
    assert total.item() / count.item() == pytest.approx((6.685894 + 3.320117 + 1.491825) / 13.479160, abs=1e-6)
    total, count = output.metrics["teacher/top_k_overlap"]
    assert (total.item(), count.item()) == (WORDS, WORDS)  # eight of six words are all of them


@pytest.mark.parametrize("k", [0, -3])
def test_a_k_without_words_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k is {k}; expected .* at least 1"):
        Distillation(estimator="top_k", top_k=k)
