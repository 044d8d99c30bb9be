"""KL to the reference: value and gradient in plain float64, its expectation by enumeration, when it is reset."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import make_module
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses import Objective, PolicyOutput, ReferenceKL

LENGTHS, PROMPTS = [3, 1, 2], [1, 3, 2]


def rows(reused: bool) -> tuple[Experience, Tensor]:
    """Ragged rows with garbage outside the response, and their log-probs as a leaf."""
    e = Experience.from_rows([[1] * n for n in PROMPTS], [[2] * n for n in LENGTHS], [0.0] * 3, [0, 0, 0])
    e.token_weights = torch.tensor([0.5, 0.25, 0.125])
    noise = torch.Generator().manual_seed(0)
    tables = [torch.randn(e.input_ids.shape, generator=noise, dtype=torch.float64) for _ in range(3)]
    logprobs, old, e.reference_logprobs = (torch.where(e.response_mask, x, math.nan) for x in tables)
    e.old_logprobs = old if reused else None
    return e, logprobs.requires_grad_()


@pytest.mark.parametrize("reused", [True, False])
def test_value_and_gradient_are_those_of_the_formula(reused: bool) -> None:
    # Red: a live d (half the square has another gradient), the sign, the ratio left out or alive in d, padding counted.
    e, logprobs = rows(reused)
    Objective({"reference": ReferenceKL(2.0)})(PolicyOutput(logprobs), e, 0).loss.backward()
    value, kl, kl_k3 = 0.0, 0.0, 0.0
    for i, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        for t in range(prompt, prompt + length):
            d = e.reference_logprobs[i, t].item() - logprobs[i, t].item()
            ratio = math.exp(logprobs[i, t].item() - e.old_logprobs[i, t].item()) if reused else 1.0
            weight = 2.0 * e.token_weights[i].item()
            assert logprobs.grad[i, t].item() == pytest.approx(-weight * ratio * d, rel=1e-12)
            value -= weight * ratio * d
            kl, kl_k3 = kl - ratio * d, kl_k3 + ratio * (math.exp(d) - d - 1)
    assert not logprobs.grad[~e.response_mask].any()
    output = Objective({"reference": ReferenceKL(2.0)})(PolicyOutput(logprobs), e, 0)
    assert output.loss.item() == pytest.approx(value, rel=1e-12)
    assert [x.item() for x in output.metrics["reference/kl"]] == pytest.approx([kl, 6.0])
    assert [x.item() for x in output.metrics["reference/kl_k3"]] == pytest.approx([kl_k3, 6.0])


def test_its_expectation_is_the_gradient_of_the_reverse_kl() -> None:
    # Every word of a vocabulary of five as the sampled token, weighed by its probability: exact.
    noise = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=noise, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, generator=noise, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    e = Experience.from_rows([[1]] * 5, [[2]] * 5, [0.0] * 5, [0] * 5)
    e.token_weights = logprobs.detach().exp()
    e.reference_logprobs = torch.nn.functional.pad(reference[:, None], (1, 0))
    policy = PolicyOutput(torch.nn.functional.pad(logprobs[:, None], (1, 0)))
    output = Objective({"reference": ReferenceKL(1.0)})(policy, e, 0)
    (got,) = torch.autograd.grad(output.loss, logits)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-15)
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    assert output.loss.item() == pytest.approx(kl.item(), rel=1e-12)


def test_resets_come_after_every_so_many_rollouts() -> None:
    assert [k for k in range(10) if ReferenceKL(reset_every=3).resets_after(k)] == [2, 5, 8]
    assert not any(ReferenceKL().resets_after(k) for k in range(1000))
    with pytest.raises(ValueError, match="reset_every is 0"):
        ReferenceKL(reset_every=0)
    with pytest.raises(ValueError, match="2 terms are a ReferenceKL"):
        make_module("student", "teacher", terms={"a": ReferenceKL(), "b": ReferenceKL()})
