"""DisCO: slopes and value against the formula differentiated in float64; numbers by hand; ranks; micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import make_module
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses import DisCO, Distillation
from kdrl_pl.schedules import Switch

# Group 3: two right, three wrong; 5: one and one; 8: all wrong; 9: all right. Ragged, so that lengths matter.
GROUP = [3, 3, 3, 3, 3, 5, 5, 8, 8, 9, 9]
CORRECT = [True, False, False, True, False, False, True, False, False, True, True]
PROMPTS = [1, 2, 1, 3, 1, 2, 2, 1, 1, 2, 1]
LENGTHS = [3, 1, 4, 2, 2, 5, 1, 2, 3, 1, 2]
TOKENS = 26


def rows(**fields) -> Experience:
    words = [[(3 * i + t) % 7 + 3 for t in range(n)] for i, n in enumerate(LENGTHS)]
    return Experience.from_rows([[5] * n for n in PROMPTS], words, [0.0] * 11, GROUP, correct=CORRECT, **fields)


def logprobs_of(experience: Experience, shift: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(B, T) current and old log-probs, garbage outside the response; KL(old || current) is about `shift`."""
    noise = torch.Generator().manual_seed(seed)
    shape = experience.input_ids.shape
    old = -3 * torch.rand(shape, generator=noise, dtype=torch.float64) - 0.1
    current = old + 0.5 * torch.randn(shape, generator=noise, dtype=torch.float64)
    mask = experience.response_mask
    current = current + ((old - current)[mask].mean() - shift)
    return torch.where(mask, current, math.nan), torch.where(mask, old, math.inf)


def reference(experience: Experience, logprobs: Tensor, score: str, tau: float, beta: float, delta: float) -> Tensor:
    """The paper's formula, row by row; minus what is maximised."""
    mask, old = experience.response_mask, experience.old_logprobs
    gain, scores = 0.0, []
    for i in range(len(experience)):
        of_row = logprobs[i][mask[i]]
        scores.append(of_row.mean() if score == "logprob" else (of_row - old[i][mask[i]]).exp().mean())
    for g in set(GROUP):
        right = [s for s, c, h in zip(scores, CORRECT, GROUP, strict=True) if h == g and c]
        wrong = [s for s, c, h in zip(scores, CORRECT, GROUP, strict=True) if h == g and not c]
        if right and wrong:
            gain = gain + torch.stack(right).mean() - tau * (torch.stack(wrong) / tau).exp().mean().log()
    kl = (old[mask] - logprobs[mask]).mean()
    return -gain / len(set(GROUP)) + 0.5 * beta * torch.relu(kl - delta) ** 2


@pytest.mark.parametrize("score", ["logprob", "ratio"])
@pytest.mark.parametrize("tau", [None, 0.3])
@pytest.mark.parametrize(
    ("shift", "beta", "delta"), [(0.02, 1e3, 1e-4), (0.02, 1e3, 0.05), (-0.1, 1e3, 1e-4), (1.0, 7.0, 0)]
)
def test_value_and_slopes_are_those_of_the_formula(score, tau, shift, beta, delta) -> None:
    # Red: a sum for a mean, tau left out of the softmax, tokens for rows, P without the groups that have no signal,
    # a hinge on the wrong side or not squared, garbage outside the mask.
    experience = rows()
    current, experience.old_logprobs = logprobs_of(experience, shift)
    made = DisCO(score=score, tau=tau, beta=beta, delta=delta).slopes(current, experience, lambda x: x)
    leaf = current.clone().requires_grad_()
    tau = tau or {"logprob": 10.0, "ratio": 1.0}[score]
    expected = reference(experience, leaf, score, tau, beta, delta)
    (gradient,) = torch.autograd.grad(expected, leaf)
    assert made.value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (made.slopes - gradient).norm() <= 1e-12 * gradient.norm()
    moved, tokens = made.metrics["train/kl_to_old"]
    assert moved.item() / tokens.item() == pytest.approx(shift)
    assert tokens == TOKENS


def test_numbers_by_hand() -> None:
    # One group; one-token rows; right: -1, wrong: -1 and -1 - 10 ln 3, so that the softmax at tau 10 is 3/4, 1/4.
    # Value: -(-1 + 1 - 10 ln(2/3)) = 10 ln(2/3).
    experience = Experience.from_rows([[1]] * 3, [[2]] * 3, [0.0] * 3, [0] * 3, correct=[True, False, False])
    logprobs = torch.tensor([[0.0, -1.0], [0.0, -1.0], [0.0, -1.0 - 10 * math.log(3)]], dtype=torch.float64)
    made = DisCO().slopes(logprobs, experience, lambda x: x)
    assert made.slopes[:, 1].tolist() == pytest.approx([-1.0, 0.75, 0.25])
    assert made.value.item() == pytest.approx(10 * math.log(2 / 3))
    # On policy the ratios are all 1: the wrong ones weigh the same, and the value is 0.
    made = DisCO(score="ratio").slopes(logprobs, experience, lambda x: x)
    assert made.slopes[:, 1].tolist() == pytest.approx([-1.0, 0.5, 0.5])
    assert made.value.item() == pytest.approx(0.0)
    # The KL is 0.1 above delta: each of three tokens is pulled up by 1000 * 0.1 / 3.
    experience.old_logprobs = logprobs + 0.2
    made = DisCO(score="ratio", delta=0.1).slopes(logprobs, experience, lambda x: x)
    pull = 100 / 3
    ratio = math.exp(-0.2)
    assert made.slopes[:, 1].tolist() == pytest.approx([-ratio - pull, ratio / 2 - pull, ratio / 2 - pull])
    assert made.value.item() == pytest.approx(500 * 0.1**2)


def test_unlikely_responses_do_not_overflow() -> None:
    # Red: exp(s / tau) without the maximum taken out: 0 / 0 at s = -5000.
    experience = Experience.from_rows([[1]] * 3, [[2]] * 3, [0.0] * 3, [0] * 3, correct=[True, False, False])
    made = DisCO(tau=1.0).slopes(torch.tensor([[0.0, -1.0], [0.0, -5e3], [0.0, -6e3]]), experience, lambda x: x)
    assert made.slopes[:, 1].tolist() == [-1.0, 1.0, 0.0]
    assert made.slopes.dtype == torch.float32


def test_ranks_count_groups_tokens_and_kl_together() -> None:
    # Red: a hinge per rank, or the means over the groups and tokens of a rank.
    whole = rows()
    current, whole.old_logprobs = logprobs_of(whole, 0.02)
    expected = DisCO().slopes(current, whole, lambda x: x)
    parts = [slice(0, 7), slice(7, 11)]
    seen: list[list[Tensor]] = [[], []]

    def run(rank: int, all_reduce):
        part = whole[parts[rank]]
        width = part.input_ids.shape[1]
        return DisCO().slopes(current[parts[rank], :width], part, all_reduce), width

    for rank in (0, 1):  # what each rank has to add
        run(rank, lambda x, rank=rank: (seen[rank].append(x), x)[1])
    for rank in (0, 1):
        sums = iter([a + b for a, b in zip(*seen, strict=True)])
        made, width = run(rank, lambda x, sums=sums: next(sums))
        assert torch.allclose(made.slopes, expected.slopes[parts[rank], :width], rtol=1e-12, atol=0)
        expected.value = expected.value - made.value
    assert expected.value.item() == pytest.approx(0.0, abs=1e-12)


def gradient(module, e: Experience, parts) -> Tensor:
    module.zero_grad()
    e = e[:]
    module.prepare(e)
    for part in parts:
        module.loss(e[part]).loss.backward()
    return torch.cat([p.grad.double().flatten() for p in module.student.parameters()])


def current_loss(module, e: Experience, score: str) -> Tensor:
    """The formula on the student's own log-probs, with gradient, all rows at once."""
    logprobs = module.student.token_logprobs(e.input_ids, e.response_mask, e.temperature).logprobs.double()
    return reference(e, logprobs, score, {"logprob": 10.0, "ratio": 1.0}[score], 1e3, 1e-4)


@pytest.mark.parametrize("score", ["logprob", "ratio"])
def test_micro_batches_give_the_gradient_of_the_whole(score, tiny_models) -> None:
    # Red: a softmax or a hinge per micro-batch, or rows without both kinds skipped while the KL is to be held.
    settings = {"distillation": None, "policy_gradient": None, "terms": {"disco": DisCO(score=score)}}
    module = make_module(tiny_models[0], None, **settings).load()
    module.student.double()
    e = module.score(rows())
    noise = torch.randn(e.input_ids.shape, generator=torch.Generator().manual_seed(2))
    e.old_logprobs = module.student_logprobs(e) + torch.where(e.response_mask, 0.05 + 0.1 * noise, 0.0)
    module.zero_grad()
    current_loss(module, e, score).backward()
    expected = torch.cat([p.grad.flatten() for p in module.student.parameters()])
    whole = gradient(module, e, [range(11)])
    assert (whole - expected).norm() <= 1e-6 * expected.norm()  # slopes are kept in float32
    for parts in ([[4, 0, 7, 9, 1, 8], [2, 10, 3, 6, 5]], [[0], [7], [1, 10], [3], [2, 9], [6, 4], [5], [8]]):
        assert (gradient(module, e, parts) - whole).norm() <= 1e-12 * whole.norm()
    prepared = e[:]
    sums = module.prepare(prepared)
    assert sums["train/disco_loss"][0].item() == pytest.approx(current_loss(module, e, score).item(), rel=1e-5)
    assert module.objective.active(prepared, 0).all()  # each row is part of the KL


def test_groups_without_both_kinds_are_not_run_while_the_kl_is_small(tiny_models) -> None:
    settings = {"distillation": None, "policy_gradient": None, "terms": {"disco": DisCO(coef=2.0)}}
    module = make_module(tiny_models[0], None, **settings).load()
    e = module.score(rows())
    sums = module.prepare(e)
    assert module.objective.active(e, 0).tolist() == [True] * 7 + [False] * 4
    assert sums["train/loss"] == sums["train/disco_loss"]
    half = make_module(tiny_models[0], None, **{**settings, "terms": {"disco": DisCO()}}).load()
    assert 2 * half.prepare(half.score(rows()))["train/loss"][0].item() == pytest.approx(sums["train/loss"][0].item())


def test_without_the_term_nothing_is_prepared(tiny_models) -> None:
    # Red: a forward pass for a term whose coefficient is 0, or for none.
    module = make_module(tiny_models[0], None, terms={"disco": DisCO(coef=Switch(0.0, 1.0, 5))}).load()
    e = module.score(rows())
    module.student_logprobs = None
    assert module.prepare(e, rollout=4) == {}
    assert e.slopes is None
    assert module.loss(e, rollout=4).loss.isfinite()


def test_rows_that_were_not_prepared_are_refused(tiny_models) -> None:
    settings = {"distillation": None, "policy_gradient": None, "terms": {"disco": DisCO()}}
    module = make_module(tiny_models[0], None, **settings).load()
    e = module.score(rows())
    with pytest.raises(ValueError, match=r"DisCO looks at all rows of an update at once.*call module\.prepare"):
        module.loss(e)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "mean"}, "score is 'mean'; expected logprob or ratio"),
        ({"tau": 0.0}, r"tau is 0\.0"),
        ({"beta": -1.0}, r"beta and delta are -1\.0"),
        ({"delta": math.nan}, "beta and delta are 1000.0 and nan"),
    ],
)
def test_unsound_settings_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        DisCO(**arguments)


def test_two_such_terms_are_refused() -> None:
    with pytest.raises(ValueError, match="a and b each look at all rows of an update; keep one of them"):
        make_module("student", "teacher", terms={"a": DisCO(), "b": DisCO()}, distillation=Distillation())
