"""Stored rollouts pushed through every estimator and mask again: how good is each as an estimate of the true gradient?

The true gradient is that of the reverse KL over the whole vocabulary (estimator "full") on the same rows under the same
weights. Samples are groups: g_j is the gradient of the rows of group j of n, f_j that of "full", and the gradient of a
rollout is the sum of its g_j. All norms are over all trained weights:

    bias      |mean_j (g_j - f_j)| / |mean_j f_j|
    noise     the bias that an estimator without one would show: sqrt(var_j(g_j - f_j) / n) / |mean_j f_j|
    variance  mean_j |g_j - mean g|^2 / |mean_j f_j|^2: between prompts, between the visited states, and of the tokens
    cosine    between mean_j g_j and mean_j f_j

With a coefficient c, g_j and f_j are those of the whole objective: policy gradient plus c times the distillation term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Sums:
    """What is kept of the gradients of one variant: sums over groups.

    Args:
        gradient: (W,) sum of g_j, on the CPU.
        square: sum of |g_j|².
        with_rl: sum of <g_j, gradient of the policy gradient>.
        error: sum of |g_j - f_j|².
        loss: sum of the losses.
    """

    gradient: Tensor
    square: float = 0.0
    with_rl: float = 0.0
    error: float = 0.0
    loss: float = 0.0

    def add(self, gradient: Tensor, loss: float, rl: Tensor, exact: Tensor) -> None:
        """Count one group."""
        self.gradient += gradient
        self.square += _dot(gradient, gradient)
        self.with_rl += _dot(gradient, rl)
        self.error += _dot(gradient - exact, gradient - exact)
        self.loss += loss

    def merge(self, other: Sums) -> None:
        """Count the groups of `other` too."""
        self.gradient = self.gradient + other.gradient
        self.square += other.square
        self.with_rl += other.with_rl
        self.error += other.error
        self.loss += other.loss


@dataclass
class Replayed:
    """One stored rollout, or several pooled.

    Args:
        groups: n.
        rollouts: how many are in it.
        rl: sums of the policy gradient at its own coefficient.
        of: (estimator, mask) -> sums of that variant.
        exact: (estimator, mask) -> sum of f_j.
    """

    rl: Sums
    groups: int = 0
    rollouts: int = 1
    of: dict[tuple[str, str], Sums] = field(default_factory=dict)
    exact: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def merge(self, other: Replayed) -> None:
        """Pool the groups of `other`, which has the same variants."""
        self.groups, self.rollouts = self.groups + other.groups, self.rollouts + other.rollouts
        self.rl.merge(other.rl)
        for key, sums in other.of.items():
            self.of[key].merge(sums)
            self.exact[key] = self.exact[key] + other.exact[key]

    def table(self, coefs: Sequence[float] = ()) -> list[dict[str, Any]]:
        """A row per variant, alone (coef None) and beside the policy gradient at each coefficient; see the top.

        `loss` and `grad_norm` are of the mean over rollouts. A number that cannot be had (one group, no gradient to
        compare with) is NaN.
        """
        rows = []
        for coef in (None, *coefs):
            a, c = (0.0, 1.0) if coef is None else (1.0, coef)
            for key, sums in self.of.items():
                mean = (a * self.rl.gradient + c * sums.gradient) / self.groups
                exact = (a * self.rl.gradient + c * self.exact[key]) / self.groups
                gap = c * (sums.gradient - self.exact[key]) / self.groups
                square = (a * a * self.rl.square + 2 * a * c * sums.with_rl + c * c * sums.square) / self.groups
                true, norm, off = _norm(exact), _norm(mean), _norm(gap)
                spread = max(c * c * sums.error / self.groups - off**2, 0.0)
                rows.append(
                    {
                        "estimator": key[0],
                        "mask": key[1],
                        "coef": coef,
                        "loss": (a * self.rl.loss + c * sums.loss) / self.rollouts,
                        "grad_norm": norm * self.groups / self.rollouts,
                        "cosine": _ratio(_dot(mean, exact), norm * true),
                        "bias": _ratio(off, true),
                        "noise": _ratio(math.sqrt(spread / (self.groups - 1)), true) if self.groups > 1 else math.nan,
                        "variance": _ratio(max(square - norm**2, 0.0), true**2),
                    }
                )
        return rows


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def _norm(a: Tensor) -> float:
    return math.sqrt(_dot(a, a))


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan
