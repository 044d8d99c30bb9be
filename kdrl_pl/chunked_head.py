"""What `token_scores` computes where the logits would not fit: autograd functions over hidden states and output head.

Both compute their logits again in the backward pass and keep none between. `TokenLogprobs` takes a block of words at a
time, so that every row of the head, and of its gradient, is touched once; `Readings` needs all words of a position and
takes a chunk of positions at a time. The head's gradient is one tensor that is filled in place: in pieces, autograd
would hold two or three of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else the weight's."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, V) logits, multiplied in `dtype`, float32 or wider.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        dtype: of the product.
    """
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return logits.to(torch.promote_types(dtype, torch.float32))


class TokenLogprobs(torch.autograd.Function):
    """Log-probs of tokens, (N,): z_t − log Σ_v exp z_v with z = factor · (weight · hidden + bias)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        factor: float,
        size: int,
        block: int,
    ) -> Tensor:
        """The largest logit and the sum of exponentials are carried from block to block.

        Args:
            hidden: (N, H).
            weight: (rows, H); words are its first `size` rows.
            bias: (rows,) or None.
            tokens: (N,) int64.
            factor: logits are multiplied by it: scale over temperature.
            size: V*.
            block: words at a time.
        """
        ctx.dtype, ctx.factor, ctx.size, ctx.block = compute_dtype(weight), factor, size, block
        scaled = _Blocks(ctx, hidden, weight, bias)
        kind = torch.promote_types(ctx.dtype, torch.float32)
        largest = torch.full(tokens.shape, -torch.inf, dtype=kind, device=hidden.device)
        total, of_token = torch.zeros_like(largest), torch.zeros_like(largest)
        for words, logits in scaled:
            column, inside = _columns(tokens, words)
            of_token = torch.where(inside, logits.gather(1, column[:, None])[:, 0], of_token)
            top = torch.maximum(largest, logits.amax(1))
            total = total * (largest - top).exp() + logits.sub_(top[:, None]).exp_().sum(1)
            largest = top
        normaliser = largest + total.log()
        ctx.save_for_backward(hidden, weight, bias, tokens, normaliser)
        return of_token - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """∂/∂z_v = gradient · (1[v = t] − p_v)."""
        hidden, weight, bias, tokens, normaliser = ctx.saved_tensors
        gradients = _Gradients(ctx, hidden, weight, bias)
        for words, logits in _Blocks(ctx, hidden, weight, bias):
            column, inside = _columns(tokens, words)
            slope = logits.sub_(normaliser[:, None]).exp_().mul_(-gradient[:, None])
            slope.scatter_add_(1, column[:, None], torch.where(inside, gradient, 0.0)[:, None])
            gradients.add(slope.mul_(ctx.factor), slice(None), words)
        return (*gradients.finished(), None, None, None, None)


@dataclass
class Reading:
    """What `Readings` makes of a chunk.

    Args:
        of_logits: float32 logits (n, V) and the chunk's positions -> log-probs of the tokens (n,), and further (n,).
        chunk: positions at a time.
        size: V*.
        differentiable: which of its results depend on the logits; filled in by `forward`.
    """

    of_logits: Callable[[Tensor, slice], list[Tensor]]
    chunk: int
    size: int
    differentiable: list[bool] | None = None


class Readings(torch.autograd.Function):
    """Whatever is read off the whole vocabulary at each position: several (N,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, reading: Reading) -> tuple[Tensor, ...]:  # type: ignore[override]
        """A chunk of positions at a time.

        Args:
            hidden: (N, H).
            weight: (rows, H); words are its first `reading.size` rows.
            bias: (rows,) or None.
            reading: what is wanted.
        """
        ctx.reading, ctx.dtype, ctx.size = reading, compute_dtype(weight), reading.size
        kind = hidden.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.set_materialize_grads(False)
        words = slice(0, reading.size)
        parts = []
        for rows in _parts(len(hidden), reading.chunk):
            logits = logits_of(hidden[rows], weight[words], None if bias is None else bias[words], ctx.dtype)
            parts.append(reading.of_logits(logits, rows))
        results = tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
        with torch.enable_grad():  # on one position
            logits = logits_of(hidden[:1], weight[words], None if bias is None else bias[words], ctx.dtype)
            reading.differentiable = [
                result.requires_grad for result in reading.of_logits(logits.detach().requires_grad_(), slice(0, 1))
            ]
        ctx.mark_non_differentiable(
            *(result for result, does in zip(results, reading.differentiable, strict=True) if not does)
        )
        ctx.save_for_backward(hidden, weight, bias)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_results: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Each chunk's own graph, from its logits on."""
        hidden, weight, bias = ctx.saved_tensors
        reading, words = ctx.reading, slice(0, ctx.size)
        gradients = _Gradients(ctx, hidden, weight, bias)
        device, dtype, enabled = ctx.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            for rows in _parts(len(hidden), reading.chunk):
                logits = logits_of(hidden[rows], weight[words], None if bias is None else bias[words], ctx.dtype)
                logits.requires_grad_()
                with torch.enable_grad():
                    results = reading.of_logits(logits, rows)
                wanted = [
                    (result, gradient[rows])
                    for result, gradient, does in zip(results, of_results, reading.differentiable, strict=True)
                    if does and gradient is not None
                ]
                if wanted:
                    (slope,) = torch.autograd.grad([r for r, _ in wanted], [logits], [g for _, g in wanted])
                    gradients.add(slope, rows, words)
        return (*gradients.finished(), None)


class _Blocks:
    """(words, their scaled logits (N, n)), block by block."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.ctx, self.hidden, self.weight, self.bias = ctx, hidden.to(ctx.dtype), weight, bias

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for words in _parts(self.ctx.size, self.ctx.block):
            bias = None if self.bias is None else self.bias[words]
            logits = logits_of(self.hidden, self.weight[words], bias, self.ctx.dtype)
            yield words, logits if self.ctx.factor == 1.0 else logits.mul_(self.ctx.factor)


class _Gradients:
    """Gradients of hidden states, weight and bias, filled in place, float32 or wider until they are finished."""

    def __init__(self, ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.inputs, self.dtype = (hidden, weight, bias), ctx.dtype  # type: ignore[attr-defined]
        kind = torch.promote_types(self.dtype, torch.float32)
        wanted = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        self.hidden, self.weight, self.bias = (
            torch.zeros(x.shape, dtype=kind, device=x.device) if x is not None and wants else None
            for x, wants in zip(self.inputs, wanted, strict=True)
        )

    def add(self, slope: Tensor, rows: slice, words: slice) -> None:
        """The part of the gradient at the logits of `rows` and `words`."""
        hidden, weight, _ = self.inputs
        if self.bias is not None:
            self.bias[words] += slope.sum(0)
        slope = slope.to(self.dtype)
        if self.hidden is not None:
            _add_product(self.hidden[rows], slope, weight[words].to(self.dtype))
        if self.weight is not None:
            _add_product(self.weight[words], slope.T, hidden[rows].to(self.dtype))

    def finished(self) -> list[Tensor | None]:
        return [
            None if gradient is None else gradient.to(of.dtype)
            for gradient, of in zip((self.hidden, self.weight, self.bias), self.inputs, strict=True)
        ]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place; the sum over parts is in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _columns(tokens: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """(N,) column of each token in a block of words, and whether it is in there at all."""
    return (tokens - words.start).clamp(0, words.stop - words.start - 1), (tokens >= words.start) & (
        tokens < words.stop
    )


def _parts(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
