import math
import random

import pytest

from kdrl_pl.study.statistics import Estimate, estimate, paired_difference, t_probability, t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [  # printed tables of Student's t
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 3, 3.1824),
        (0.975, 4, 2.7764),
        (0.975, 9, 2.2622),
        (0.975, 30, 2.0423),
        (0.975, 120, 1.9799),
        (0.95, 2, 2.9200),
        (0.95, 5, 2.0150),
        (0.995, 4, 4.6041),
        (0.9995, 3, 12.9240),
        (0.025, 4, -2.7764),
        (0.5, 7, 0.0),
    ],
)
def test_quantiles_are_those_of_the_tables(probability, degrees, value):
    assert t_quantile(probability, degrees) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("t", [-1.3, 0.4, 5.0])
def test_the_probability_is_the_integral_of_the_density(t, degrees):
    constant = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    n = 20000
    density = [constant * (1 + (t * i / n) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(n + 1)]
    integral = t / n * (sum(density) - (density[0] + density[-1]) / 2)
    assert t_probability(t, degrees) == pytest.approx(0.5 + integral, abs=1e-8)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.9, 0)])
def test_a_quantile_that_is_none(probability, degrees):
    with pytest.raises(ValueError, match="t quantile"):
        t_quantile(probability, degrees)


def test_an_interval_by_hand():
    """1, 2, 3: mean 2, s = 1, so the half is 4.3027 / √3."""
    assert estimate([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(2.48414, abs=1e-5), 3)
    assert estimate([0.25]) == Estimate(0.25, None, 1)


def test_intervals_cover_the_mean_as_often_as_they_say():
    generator = random.Random(0)
    samples = [estimate([generator.gauss(5, 2) for _ in range(3)]) for _ in range(4000)]
    covered = sum(abs(sample.mean - 5) <= sample.half for sample in samples) / len(samples)
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_differences_are_paired_by_seed_and_not_by_position():
    first, second = {0: 0.5, 1: 0.7, 2: 0.6}, {2: 0.5, 1: 0.6, 0: 0.4, 9: 0.0}
    assert paired_difference(first, second) == Estimate(pytest.approx(0.1), pytest.approx(0.0, abs=1e-12), 3)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("mean", "half", "tie"),
    [(0.1, 0.09, False), (-0.1, 0.09, False), (0.1, 0.1, True), (-0.1, 0.2, True), (0.3, None, True), (0.0, 0.0, True)],
)
def test_an_interval_that_contains_zero_is_a_tie(mean, half, tie):
    assert Estimate(mean, half, 3).is_tie is tie
