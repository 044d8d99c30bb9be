"""Curves of a long run: how rollouts are put together, and what is left out."""

from __future__ import annotations

import math

from kdrl_pl.report.curves import Point, bucket_width, curve, of_metric, phase_shares


def test_a_short_run_keeps_every_rollout():
    assert bucket_width(160) == 1
    made = curve("reward", [(1, 0.5), (2, 0.25)])
    assert made.points == [Point(1, 1, 0.5, 0.5, 0.5), Point(2, 2, 0.25, 0.25, 0.25)]


def test_a_long_run_keeps_means_and_extremes():
    assert bucket_width(1000) == 7 and bucket_width(161) == 2
    values = [(0, 9.0), (1, 1.0), (2, 3.0), (3, 5.0), (4, -1.0), (7, 2.0)]  # 0 is the validation before training
    assert curve("x", values, width=2).points == [
        Point(0, 0, 9.0, 9.0, 9.0),
        Point(1, 2, 2.0, 1.0, 3.0),
        Point(3, 4, 2.0, -1.0, 5.0),
        Point(7, 7, 2.0, 2.0, 2.0),
    ]


def test_a_thousand_rollouts_make_at_most_160_points():
    made = curve("x", [(k, float(k)) for k in range(1, 1001)], bucket_width(1000))
    assert len(made.points) == 143 and made.points[-1] == Point(995, 1000, 997.5, 995.0, 1000.0)


def test_values_that_are_not_finite_are_counted():
    rows = [(1, {"a": 1.0}), (2, {"a": None}), (3, {}), (4, {"a": math.inf}), (5, {"a": 2.0})]
    made = curve("a", of_metric(rows, "a"))
    assert [p.mean for p in made.points] == [1.0, 2.0] and made.missing == 2


def test_shares_of_the_time_sum_to_one():
    rows = [
        (1, {"time/step": 4.0, "time/rollout": 1.0, "time/update": 2.0}),
        (2, {"time/step": 4.0, "time/rollout": 3.0}),
        (3, {"reward/mean": 1.0}),
    ]
    spans, shares = phase_shares(rows, ["rollout", "update"], width=2)
    assert spans == [(1, 2)] and shares == [[0.5, 0.25, 0.25]]
