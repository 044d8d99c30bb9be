"""The soft penalty for responses that come close to the token budget."""

from __future__ import annotations

from collections.abc import Sequence

from kdrl_pl.rewards.base import CannotJudge, Completion, RewardOutput


class SoftOverlong:
    """Zero up to `L_max - L_cache` tokens, then falling linearly to -1 at `L_max` (DAPO, arXiv 2503.14476, Eq. 13).

    `((L_max - L_cache) - |o|) / L_cache` with |o| the sampled tokens, end token included, and L_max the budget of the
    rollout. It never says anything about correctness. Metrics: `penalised`, the rows below zero.

    Args:
        cache_tokens: L_cache, the tokens before the budget within which the penalty grows.

    Raises:
        ValueError: `cache_tokens` below 1; in a call, a budget that is not larger.
    """

    def __init__(self, cache_tokens: int) -> None:
        if cache_tokens < 1:
            raise ValueError(f"cache_tokens is {cache_tokens}; expected at least 1")
        self.cache_tokens = cache_tokens

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        values = [self._penalty(len(c.token_ids), c.max_tokens) for c in completions]
        return RewardOutput(values, metrics={"penalised": (float(sum(v < 0 for v in values)), float(len(values)))})

    def _penalty(self, length: int, max_tokens: int) -> float:
        if max_tokens <= self.cache_tokens:
            raise CannotJudge(
                f"cache_tokens is {self.cache_tokens} and the response budget {max_tokens}; the budget must be larger:"
                " lower cache_tokens or raise the rollout's max_tokens"
            )
        return min(0.0, (max_tokens - self.cache_tokens - length) / self.cache_tokens)
