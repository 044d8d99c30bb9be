"""From logits to tokens: temperature, filters and inverse-CDF sampling from one uniform number per row.

Notation: B rows, V vocabulary. Everything here is a pure function of its arguments and touches no random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 64  # words per block of the inverse CDF
_ONE_BLOCK = 1024  # up to this vocabulary a single running sum is cheaper than blocks
_BELOW_ONE = 1 - 2**-52  # a positive number times this is smaller than that number, in float64
_NUCLEUS = 1024  # candidates tried for top-p before the whole vocabulary is sorted


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    The filters apply in the order top-k, top-p, min-p, each to what the one before left over. They keep or drop
    *values*: words tied with the last one kept are kept too. With a filter on, the sampler is another policy than the
    one that is scored, so they are meant for evaluation.

    Args:
        temperature: divides the logits; 0 takes the most likely word (the filters then do nothing and log-probs are
            those at temperature 1), which is for evaluation only.
        top_p: keep the smallest set of most likely words whose probability reaches this; 1 = off.
        top_k: keep this many most likely words; 0 = off.
        min_p: keep words at least this many times as likely as the likeliest one; 0 = off.
        max_tokens: budget of a completion in tokens, its end token included.
        stop_token_ids: further ids that end a completion, besides those of the tokenizer and the generation config.

    Raises:
        ValueError: a value lies outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 8192
    stop_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a finite number >= 0 (0 = most likely word)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a number in (0, 1] (1 = off)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected a whole number >= 0 (0 = off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; expected a number in [0, 1] (0 = off)")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected at least 1 token")
        if any(token < 0 for token in self.stop_token_ids or ()):
            raise ValueError(f"stop_token_ids are {self.stop_token_ids}; token ids are never negative")

    @property
    def is_greedy(self) -> bool:
        """True when the most likely word is taken instead of a sample."""
        return self.temperature == 0

    @property
    def is_filtered(self) -> bool:
        """True when top-k, top-p or min-p may remove words, so that samples are not the policy's own."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def next_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob under the distribution it was drawn from.

    Args:
        logits: (B, V) float32, straight from the model.
        uniforms: (B,) float64 in [0, 1), the rows' random numbers for this token.
        sampling: temperature and filters.

    Returns:
        tokens (B,) int64 and logprobs (B,) float32 nats, after temperature and filters.
    """
    if sampling.is_greedy:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    return sample_tokens(filter_logits(logits, sampling), uniforms)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits with -inf on the words that top-k, top-p and min-p remove; the input itself when all are off.

    Args:
        logits: (B, V) float32, temperature already applied.
        sampling: the filters.
    """
    if 0 < sampling.top_k < logits.shape[1]:
        logits = _drop_below(logits, logits.topk(sampling.top_k).values[:, -1:])
    if sampling.top_p < 1:
        logits = _drop_below(logits, _nucleus_edge(logits, sampling.top_p))
    if sampling.min_p > 0:
        logits = _drop_below(logits, logits.amax(-1, keepdim=True) + math.log(sampling.min_p))
    return logits


def sample_tokens(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The word at which the running sum of probabilities first exceeds the row's uniform number, and its log-prob.

    A single fp32 running sum over 150,000 words is too coarse, and float64 over all of them three times slower. So
    blocks of 64 words are summed in fp32 and the blocks in float64; the place inside the block is found relative to
    the block's own float64 sum. Every word's probability is then right to a *relative* 1e-6, the rarest included.
    A word of probability 0 is never returned.

    Args:
        logits: (B, V) float32; -inf on words that may not be sampled.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        tokens (B,) int64 and logprobs (B,) float32 nats; NaN log-probs for a row whose logits hold NaN or +inf, or
        nothing but -inf.
    """
    weights = logits.softmax(-1)  # (B, V)
    vocabulary = weights.shape[1]
    if vocabulary <= _ONE_BLOCK:
        tokens, _, total = _pick(weights, uniforms[:, None])  # (B, 1) each
    else:
        block, rest, total = _pick(_block_sums(weights), uniforms[:, None])
        words = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)  # (B, 64)
        inside = weights.gather(1, words.clamp(max=vocabulary - 1)).masked_fill(words >= vocabulary, 0)
        tokens = (block * _BLOCK + _pick(inside, rest())[0]).clamp_(max=vocabulary - 1)  # clamp: NaN only
    # `total` is 1 up to rounding; dividing by it makes this the log-softmax without a second pass over the words.
    logprobs = (weights.gather(1, tokens) / total).log().float()
    return tokens.squeeze(1), logprobs.squeeze(1)


def _pick(weights: Tensor, fractions: Tensor) -> tuple[Tensor, Callable[[], Tensor], Tensor]:
    """Per row: the column at which the running sum exceeds `fraction` of the total, a function that tells how far into
    that column it lies (in [0, 1]), and the total; (B, 1) each. Columns of weight 0 are never picked.

    Args:
        weights: (B, N) >= 0.
        fractions: (B, 1) float64 in [0, 1].
    """
    running = weights.cumsum(-1, dtype=torch.float64)  # (B, N)
    total = running[:, -1:]
    target = fractions * (total * _BELOW_ONE)  # below the total, so that a column with weight always lies beyond it
    column = torch.searchsorted(running, target, right=True).clamp_(max=weights.shape[1] - 1)  # clamp: NaN only

    def rest() -> Tensor:
        upper = running.gather(1, column)
        lower = running.gather(1, (column - 1).clamp_(min=0)).where(column > 0, 0.0)
        return (target - lower) / (upper - lower)

    return column, rest, total


def _block_sums(weights: Tensor) -> Tensor:
    """(B, ceil(V / 64)) sums of 64 neighbouring words each, the last block shorter."""
    whole = weights.shape[1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole == weights.shape[1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)


def _drop_below(logits: Tensor, edge: Tensor) -> Tensor:
    return logits.masked_fill(logits < edge, -math.inf)


def _nucleus_edge(logits: Tensor, top_p: float) -> Tensor:
    """(B, 1) the smallest logit among the fewest most likely words that together reach probability `top_p`."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    candidates = min(_NUCLEUS, logits.shape[1])
    while True:
        ranked = logits.topk(candidates).values  # (B, candidates), falling
        mass = (ranked - normaliser).double().exp().cumsum(-1)
        # The candidates nearly always hold the nucleus, and finding them is 20 times cheaper than a sort.
        if candidates == logits.shape[1] or bool((mass[:, -1] >= top_p).all()):
            break
        candidates = logits.shape[1]
    last = (mass < top_p).sum(-1, keepdim=True).clamp_(max=candidates - 1)  # (B, 1)
    return ranked.gather(1, last)
