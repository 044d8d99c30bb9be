"""Which prompts make rollout k: a pure function of the seed and k, so that a run can start at any k without memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdrl_pl.data.prompts import PromptBatch


class PromptSampler:
    """Draws whole rollouts from one or several sets.

    Each set is walked through in permutations of its own, one after the other, keyed by (seed, pass, set name): every
    row comes once per pass. Several sets are interleaved by stride scheduling: the n-th draw of a set of weight w is
    due at (n + 1/2) / w, and draws come in the order of their dues, ties in the order of the sets. Shares are thus
    exact to one draw at any point of the run, and the draws before rollout k can be counted without replaying them.
    No random generator is involved (rows are sorted by a hash), so library versions and RNG states do not matter.

    Args:
        sizes: rows per set, in the order of the config.
        weights: per set its share relative to the others; None means equal.
        prompts_per_rollout: P, over all ranks.
        seed: of the permutations.
        world_size: ranks that share a rollout; P must divide.

    Raises:
        ValueError: a weight is not positive, P is not divisible by `world_size`, or there are fewer rows than P.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        prompts_per_rollout: int = 128,
        seed: int = 0,
        world_size: int = 1,
    ) -> None:
        self.names = list(sizes)
        self.sizes = [sizes[name] for name in self.names]
        self.prompts_per_rollout = prompts_per_rollout
        self.seed = seed
        shares = [1.0 if weights is None else weights[name] for name in self.names]
        for name, share in zip(self.names, shares, strict=True):
            if not (math.isfinite(share) and share > 0):
                raise ValueError(
                    f"set {name!r} has weight {share}; expected more than 0 (remove the set to leave it out)"
                )
        if prompts_per_rollout < 1 or prompts_per_rollout % world_size:
            below = max(world_size, prompts_per_rollout // world_size * world_size)
            raise ValueError(
                f"prompts_per_rollout is {prompts_per_rollout}, not divisible by {world_size} ranks; "
                f"set it to {below} or {below + world_size}"
            )
        if sum(self.sizes) < prompts_per_rollout:
            raise ValueError(
                f"{sum(self.sizes)} training prompts are fewer than prompts_per_rollout={prompts_per_rollout}; "
                f"set data.prompts_per_rollout to at most {sum(self.sizes)}, or give more prompts"
            )
        # Whole numbers from here on, so that equal dues are equal: 1/w as a multiple of a common unit.
        exact = [Fraction(str(share)) for share in shares]
        whole = [int(share * math.lcm(*(e.denominator for e in exact))) for share in exact]
        self._strides = [math.lcm(*whole) // weight for weight in whole]
        self._current: list[tuple[int, list[int]]] = [(-1, [])] * len(self.names)

    @property
    def rollouts_per_epoch(self) -> int:
        """Whole rollouts in as many draws as there are rows."""
        return sum(self.sizes) // self.prompts_per_rollout

    def rollout(self, k: int) -> list[tuple[str, int]]:
        """The global list of rollout k: (set name, row) per prompt; rank r of w takes `[r::w]` of it."""
        drawn = self._drawn_before(k * self.prompts_per_rollout)
        picked = []
        for _ in range(self.prompts_per_rollout):
            j = self._next_set(drawn)
            lap, place = divmod(drawn[j], self.sizes[j])
            picked.append((self.names[j], self._permutation(j, lap)[place]))
            drawn[j] += 1
        return picked

    def follow(self, batch: PromptBatch, drawn: Sequence[tuple[str, int]]) -> None:
        """Called with every batch that is handed out; a sampler with memory reads later what became of it.

        Args:
            batch: this rank's share of a rollout, before it is sampled.
            drawn: the global list of that rollout.
        """

    def _next_set(self, drawn: list[int]) -> int:
        return min(range(len(drawn)), key=lambda j: (2 * drawn[j] + 1) * self._strides[j])

    def _permutation(self, j: int, lap: int) -> list[int]:
        if self._current[j][0] != lap:  # kept per set: a rollout asks for it once per prompt
            self._current[j] = (lap, permutation(self.seed, lap, self.names[j], self.sizes[j]))
        return self._current[j][1]

    def _drawn_before(self, slot: int) -> list[int]:
        """Draws of each set among the first `slot` slots, in O(sets²) whatever the slot."""
        # All draws due before time D number at most D·Σw + sets/2: at this D they are surely among the first slots.
        rate = sum(Fraction(1, stride) for stride in self._strides)
        due = max(Fraction(0), (slot - len(self.sizes)) / rate)
        drawn = [max(0, math.ceil(due / stride - Fraction(1, 2))) for stride in self._strides]
        for _ in range(slot - sum(drawn)):
            drawn[self._next_set(drawn)] += 1
        return drawn


def permutation(seed: int, lap: int, name: str, size: int) -> list[int]:
    """The numbers 0 ... size-1 in an order that only the arguments decide."""
    key = f"{seed}/{lap}/{name}/".encode()
    digests = [blake2b(key + str(row).encode(), digest_size=8).digest() for row in range(size)]
    return sorted(range(size), key=digests.__getitem__)


def occurrences(items: list[tuple[str, int]]) -> list[int]:
    """For each item how often it came before in the list (0, 1, ...)."""
    seen: Counter[tuple[str, int]] = Counter()
    result = []
    for item in items:
        result.append(seen[item])
        seen[item] += 1
    return result
