"""Means over seeds with Student's t-intervals, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its t-interval.

    Args:
        mean: of the n values.
        half: half the width of the interval; None when one value says nothing of the spread.
        n: number of values.
    """

    mean: float
    half: float | None
    n: int

    @property
    def is_tie(self) -> bool:
        """For a difference: it cannot be told from 0, because its interval contains 0 or there is no interval."""
        return self.half is None or abs(self.mean) <= self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of `values` and its 95 % t-interval: mean ± t_{0.975, n−1} · s/√n, s with n − 1.

    Args:
        values: one per seed, at least one.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, None, n)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, t_quantile(0.975, n - 1) * deviation / math.sqrt(n), n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """Mean of first − second over the seeds that both have; None when they share none.

    Args:
        first: seed -> value.
        second: the same of what it is compared with.
    """
    shared = [seed for seed in first if seed in second]
    return estimate([first[seed] - second[seed] for seed in shared]) if shared else None


def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(T ≤ t) = `probability` for Student's t with `degrees` degrees of freedom, by bisection.

    Raises:
        ValueError: the probability is not between 0 and 1, or there is no degree of freedom.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"t quantile of {probability} with {degrees} degrees; expected 0 < p < 1 and 1 or more")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:  # until no number lies between them
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return high


def t_probability(t: float, degrees: int) -> float:
    """P(T ≤ t), exactly: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4 for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):  # the terms with cos^odd ... cos^(degrees − 2)
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return (1 + inside) / 2
