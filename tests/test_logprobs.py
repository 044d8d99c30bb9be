"""Chunked log-probs against plain log_softmax: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kdrl_pl import logprobs
from kdrl_pl.logprobs import Head, TokenScores, Vocabulary, token_scores

N, V, H, H_TEACHER = 11, 13, 5, 3
TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.0},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 4 * V)  # 11 positions are two chunks and a part of one


def make(n: int, dtype: torch.dtype, width: int = H, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (n, width), head weight (V, width) and bias (V,), all with gradient."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((n, width), (V, width), (V,))
    return tuple(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


def words(n: int) -> Tensor:
    return (7 * torch.arange(n) + 3) % V


def plain(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """(N, V) log-probs, written once more."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(-1)


def read(vocabulary: Vocabulary) -> dict[str, Tensor]:
    return {"divergence": reverse_kl(vocabulary.logprobs, vocabulary.teacher)}


def gradients(scores: TokenScores, of: list[Tensor]) -> list[Tensor]:
    """Of a sum in which no two positions weigh the same."""
    n = len(scores.logprobs)
    loss = (scores.logprobs * torch.linspace(-1, 2, n)).sum()
    if scores.readings:
        loss = loss + (scores.readings["divergence"] * torch.linspace(3, 1, n)).sum()
    return [g.double() for g in torch.autograd.grad(loss, of)]


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert (got.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_divergence", [False, True], ids=["token", "divergence"])
@pytest.mark.parametrize("n", [1, 4, 11])
def test_values_and_gradients(dtype: torch.dtype, transform: str, with_divergence: bool, n: int) -> None:
    # Red: the last, partial chunk lost or doubled; temperature before the softcap, or forgotten for the teacher; bias
    # or scale forgotten; a head whose gradient is that of one chunk only; fp32 arithmetic under a float64 model.
    options = dict(TRANSFORMS[transform])
    use_bias, temperature = options.pop("bias", False), 0.7
    leaves = make(n, dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    teacher = [x.detach() for x in make(n, dtype, H_TEACHER, seed=1)]
    if not use_bias:
        leaves, exact = leaves[:2], exact[:2]
    head, exact_head = (Head(w, b[0] if b else None, **options) for _, w, *b in (leaves, exact))
    teacher_head = Head(teacher[1], teacher[2], scale=0.9, softcap=3.0)

    scores = token_scores(
        leaves[0],
        head,
        words(n),
        temperature,
        read=read if with_divergence else None,
        teacher_hidden=teacher[0] if with_divergence else None,
        teacher_head=teacher_head if with_divergence else None,
    )
    table = plain(exact[0], exact_head, temperature)
    expected = TokenScores(table[torch.arange(n), words(n)])
    if with_divergence:
        of_teacher = Head(*(x.double() for x in teacher[1:]), scale=0.9, softcap=3.0)
        expected.readings["divergence"] = reverse_kl(table, plain(teacher[0].double(), of_teacher, temperature))
        assert_close(scores.readings["divergence"], expected.readings["divergence"], dtype)
    else:
        assert scores.readings == {}
    assert scores.logprobs.dtype == dtype
    assert_close(scores.logprobs, expected.logprobs, dtype)
    for got, wanted in zip(gradients(scores, list(leaves)), gradients(expected, list(exact)), strict=True):
        assert_close(got, wanted, dtype)


def test_without_gradient_the_same_numbers() -> None:
    # Red: another path under no_grad, which old and teacher log-probs take: ratio and d would not be 1 and 0.
    hidden, weight, bias = make(N, torch.float32)
    head = Head(weight, bias, softcap=2.0)
    with torch.no_grad():
        silent = token_scores(hidden, head, words(N), 0.7).logprobs
    assert not silent.requires_grad
    assert torch.equal(silent, token_scores(hidden, head, words(N), 0.7).logprobs)


def test_no_gradient_reaches_the_teacher() -> None:
    # Red: the teacher's head or hidden states in the graph.
    hidden, weight, _ = make(N, torch.float32)
    teacher_hidden, teacher_weight, _ = make(N, torch.float32, H_TEACHER, seed=1)
    scores = token_scores(
        hidden,
        Head(weight),
        words(N),
        1.0,
        read=read,
        teacher_hidden=teacher_hidden,
        teacher_head=Head(teacher_weight),
    )
    leaves = [hidden, weight, teacher_hidden, teacher_weight]
    got = torch.autograd.grad(scores.readings["divergence"].sum(), leaves, allow_unused=True)
    assert [g is not None and bool(g.any()) for g in got] == [True, True, False, False]


def test_no_positions() -> None:
    # Red: torch.cat of nothing; a loss without a graph, which makes an idle rank hang in the all-reduce of backward.
    hidden, weight, _ = make(0, torch.float32)
    scores = token_scores(hidden, Head(weight), words(0), 1.0)
    assert scores.logprobs.shape == (0,)
    scores.logprobs.sum().backward()
    assert weight.grad.norm() == 0


def test_log_softmax_is_fp32_under_bf16_weights() -> None:
    # Red: log-probs rounded to bf16, which at -10 nats is a step of 0.06.
    hidden, weight, _ = make(N, torch.bfloat16)
    scores = token_scores(hidden, Head(weight), words(N), 1.0)
    assert scores.logprobs.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, weight).double()
    expected = logits.log_softmax(-1)[torch.arange(N), words(N)]
    assert (scores.logprobs - expected).abs().max() < 1e-5


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_iter(made) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return made


@pytest.mark.parametrize("with_divergence", [False, True], ids=["token", "divergence"])
def test_memory_holds_one_chunk_of_logits(with_divergence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red: logits of all positions at once, forward or backward; or a chunk's logits kept for its backward pass.
    n, vocabulary, width = 64, 500, 2
    monkeypatch.setattr(logprobs, "CHUNK", 4 * vocabulary)
    hidden = torch.randn(n, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    teacher = (torch.randn(n, width), Head(torch.randn(vocabulary, width))) if with_divergence else (None, None)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        scores = token_scores(
            hidden,
            Head(weight),
            torch.arange(n),
            1.0,
            read=read if with_divergence else None,
            teacher_hidden=teacher[0],
            teacher_head=teacher[1],
        )
        loss = scores.readings["divergence"].sum() if with_divergence else scores.logprobs.sum()
    for leaf in (hidden, weight):
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) < 4 * vocabulary  # less than one chunk of logits stays until backward
    with largest:
        loss.backward()
    assert 3 * vocabulary < largest.numel <= 4 * vocabulary  # one chunk of logits


@pytest.mark.parametrize("with_divergence", [False, True], ids=["token", "divergence"])
@pytest.mark.parametrize("chunk", [4 * V, 1000], ids=["pieces", "whole"])
def test_rows_beyond_the_vocabulary(chunk: int, with_divergence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red: rows of a padded head in the normaliser; a gradient that reaches them, or has another shape than the head.
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    hidden, weight, bias = make(N, torch.float32)
    teacher_hidden, teacher_weight, _ = make(N, torch.float32, H_TEACHER, seed=1)
    teacher = {"read": read, "teacher_hidden": teacher_hidden, "teacher_head": Head(teacher_weight)}
    arguments = teacher if with_divergence else {}
    padded = torch.cat([weight.detach(), torch.full((3, H), 9.0)]).requires_grad_()
    padded_bias = torch.cat([bias.detach(), torch.full((3,), 9.0)]).requires_grad_()
    cut = token_scores(hidden, Head(padded, padded_bias, size=V), words(N), 0.7, **arguments)
    whole = token_scores(hidden, Head(weight, bias), words(N), 0.7, **arguments)
    assert torch.equal(cut.logprobs, whole.logprobs)
    of_cut = gradients(cut, [hidden, padded, padded_bias])
    of_whole = gradients(whole, [hidden, weight, bias])
    assert torch.equal(of_cut[0], of_whole[0])
    for got, wanted in zip(of_cut[1:], of_whole[1:], strict=True):
        assert torch.equal(got[:V], wanted) and len(got) == V + 3 and not got[V:].any()


@pytest.mark.parametrize("with_divergence", [False, True], ids=["token", "divergence"])
def test_a_frozen_head_gets_no_gradient(with_divergence: bool) -> None:
    # Red: with adapters, a gradient of the head's size that nobody asked for; or none for what lies before it.
    hidden, weight, _ = make(N, torch.float32)
    teacher_hidden, teacher_weight, _ = make(N, torch.float32, H_TEACHER, seed=1)
    teacher = {"read": read, "teacher_hidden": teacher_hidden, "teacher_head": Head(teacher_weight)}
    arguments = teacher if with_divergence else {}
    frozen = token_scores(hidden, Head(weight.detach()), words(N), 0.7, **arguments)
    trained = token_scores(hidden, Head(weight), words(N), 0.7, **arguments)
    assert torch.equal(gradients(frozen, [hidden])[0], gradients(trained, [hidden])[0])


@pytest.mark.parametrize("with_divergence", [False, True], ids=["token", "divergence"])
def test_under_autocast(with_divergence: bool) -> None:
    # Red: products in fp32 although autocast is on; a backward pass, which runs outside of autocast, in another dtype
    # than the forward pass; the sum over pieces in bf16.
    hidden, weight, _ = make(N, torch.float32)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    teacher_hidden, teacher_weight, _ = make(N, torch.float32, H_TEACHER, seed=1)
    teacher = {"read": read, "teacher_hidden": teacher_hidden, "teacher_head": Head(teacher_weight)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = token_scores(hidden, Head(weight), words(N), 1.0, **(teacher if with_divergence else {}))
    exact = {"read": read, "teacher_hidden": teacher_hidden.bfloat16().double()}
    exact["teacher_head"] = Head(teacher_weight.bfloat16().double())
    expected = token_scores(rounded[0], Head(rounded[1]), words(N), 1.0, **(exact if with_divergence else {}))
    assert scores.logprobs.dtype == torch.float32
    assert (scores.logprobs - expected.logprobs).abs().max() < 0.05  # bf16 logits of size 8: 0.03
    for got, wanted in zip(gradients(scores, [hidden, weight]), gradients(expected, rounded), strict=True):
        assert 0 < (got - wanted).norm() <= 0.02 * wanted.norm()
