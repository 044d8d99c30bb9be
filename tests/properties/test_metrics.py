"""Sums and counts: no order, cut or number of parts changes a metric."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrl_pl.metric_names import MAXIMA, TOTALS
from kdrl_pl.metrics import EvaluationMetrics, MetricSums, pass_at_k

NAMES = ["reward/mean", "teacher/reverse_kl", sorted(MAXIMA)[0], sorted(TOTALS)[0]]
# Multiples of 1/64, which floats add without rounding: a difference is one of logic.
NUMBER = st.integers(-6400, 6400).map(lambda n: n / 64)
ADDED = st.lists(st.tuples(st.sampled_from(NAMES), NUMBER, st.integers(0, 9)), max_size=20)


def added(items) -> MetricSums:
    sums = MetricSums()
    for name, value, count in items:
        sums.add(name, value, count)
    return sums


@given(ADDED, st.randoms(use_true_random=False), st.integers(1, 5))
def test_parts_in_any_order_make_the_same_sums(items, random, parts):
    whole = added(items)
    shuffled = list(items)
    random.shuffle(shuffled)
    merged = MetricSums()
    for part in range(parts):
        merged.merge(added(shuffled[part::parts]))
    assert merged.sums() == whole.sums() and merged.compute() == whole.compute()
    assert list(whole.sums()) == sorted(whole.sums())


@given(ADDED)
def test_what_is_computed_is_the_sum_over_the_count_once(items):
    computed = added(items).compute()
    for name in NAMES:
        mine = [(value, count) for kind, value, count in items if kind == name]
        number = sum(count for _, count in mine)
        if not number:
            assert name not in computed
        elif name in MAXIMA:
            assert computed[name] == max(value for value, _ in mine)
        else:
            assert computed[name] == math.fsum(value for value, _ in mine) / (1 if name in TOTALS else number)


@given(ADDED, st.sets(st.sampled_from(NAMES)))
def test_a_name_without_anything_changes_nothing(items, names):
    sums = added(items)
    before = sums.compute()
    sums.ensure(names)
    assert sums.compute() == before


@given(ADDED)
def test_tensors_add_like_numbers(items):
    tensors = MetricSums()
    for name, value, count in items:
        tensors.add(name, torch.tensor(value), torch.tensor(count))
    assert tensors.sums() == added(items).sums()


PROBLEM = st.tuples(
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.sampled_from(["a", "b", None]), min_size=4, max_size=4),
)


def evaluated(batches) -> dict[str, float]:
    metrics = EvaluationMetrics(samples=4)
    for batch in batches:
        columns = [list(column) for column in zip(*batch, strict=True)] if batch else [[], [], [], []]
        metrics.update(*columns)
    return metrics.compute()


@given(st.lists(PROBLEM, max_size=8), st.randoms(use_true_random=False), st.integers(1, 4))
def test_validation_does_not_depend_on_batches_or_their_order(problems, random, batches):
    shuffled = list(problems)
    random.shuffle(shuffled)
    values = evaluated([problems])
    assert evaluated([shuffled[i::batches] for i in range(batches)]) == values
    if problems:
        rising = [values[f"pass_at_{k}"] for k in (1, 2, 4)]
        assert rising == sorted(rising) and values["pass_at_1"] == values["avg_at_k"]
        assert values["pass_at_4"] == sum(any(correct) for correct, *_ in problems) / len(problems)
        assert 0.0 <= values["avg_at_k"] <= 1.0


@given(st.integers(1, 40), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    value = pass_at_k(n, c, k)
    missed = math.prod((n - c - i) / (n - i) for i in range(k)) if n - c >= k else 0.0  # one draw after the other
    assert abs(value - (1 - missed)) < 1e-12
