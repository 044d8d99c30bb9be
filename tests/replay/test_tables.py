"""Bias, noise, variance and cosine of two groups with two weights, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kdrl_pl.replay.tables import Replayed, Sums

KEY = ("k2", "none")


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def replayed(*groups: tuple[torch.Tensor, float, torch.Tensor, torch.Tensor]) -> Replayed:
    """Groups as (gradient, loss, policy gradient, exact gradient)."""
    found = Replayed(Sums(vector(0, 0)), of={KEY: Sums(vector(0, 0))}, exact={KEY: vector(0, 0)})
    for gradient, loss, rl, exact in groups:
        found.groups += 1
        found.rl.add(rl, 10.0, rl, rl)
        found.of[KEY].add(gradient, loss, rl, exact)
        found.exact[KEY] += exact
    return found


ONE = (vector(2, 0), 0.5, vector(1, 1), vector(1, 0))
TWO = (vector(0, 2), 0.25, vector(1, 1), vector(1, 0))


def test_two_groups_by_hand() -> None:
    # g = (2, 0), (0, 2), mean (1, 1); f = (1, 0) twice. Gaps (1, 0), (-1, 2), mean (0, 1), each |(1, -1)| off it.
    alone, joint = replayed(ONE, TWO).table([0.5])
    assert alone == {
        "estimator": "k2",
        "mask": "none",
        "coef": None,
        "loss": 0.75,
        "grad_norm": pytest.approx(2 * math.sqrt(2)),
        "cosine": pytest.approx(1 / math.sqrt(2)),
        "bias": pytest.approx(1.0),
        "noise": pytest.approx(math.sqrt(2)),
        "variance": pytest.approx(2.0),
    }
    # (1, 1) + g/2 = (2, 1), (1, 2), mean (1.5, 1.5); exact (1.5, 1), squared 3.25; gap (0, 0.5); half the noise.
    true = math.sqrt(3.25)
    assert joint == {
        "estimator": "k2",
        "mask": "none",
        "coef": 0.5,
        "loss": 20.375,
        "grad_norm": pytest.approx(3 * math.sqrt(2)),
        "cosine": pytest.approx(3.75 / (1.5 * math.sqrt(2) * true)),
        "bias": pytest.approx(0.5 / true),
        "noise": pytest.approx(0.5 * math.sqrt(2) / true),
        "variance": pytest.approx(0.5 / 3.25),
    }


def test_pooled_rollouts_are_one_with_all_their_groups() -> None:
    # Red: averages of the rollouts' biases, which do not fall with the number of groups. Loss and norm are means.
    pooled, whole = replayed(ONE), replayed(ONE, TWO).table([0.5])
    pooled.merge(replayed(TWO))
    for row, expected in zip(pooled.table([0.5]), whole, strict=True):
        halved = {name: expected[name] / 2 for name in ("loss", "grad_norm")}
        assert row == pytest.approx({**expected, **halved})


def test_what_cannot_be_had_is_nan() -> None:
    row = replayed((vector(1, 0), 0.0, vector(0, 0), vector(0, 0))).table()[0]
    assert row["grad_norm"] == 1.0
    assert all(math.isnan(row[name]) for name in ("cosine", "bias", "noise", "variance"))
