"""Where the lines of a chart go, and what it says in words."""

from __future__ import annotations

import re

import pytest

from kdrl_pl.report.charts import _ticks, line_chart, share_chart, tick_labels
from kdrl_pl.report.curves import curve


def test_the_line_of_two_points():
    chart = line_chart("Reward", [curve("mean", [(1, 0.0), (3, 1.0)])], "")
    # labels up to "0.2" are 3 characters: 12 + 7·3 = 33 to the left, 14 to the right; 166 is the bottom, 8 the top
    assert '<path class="line s0" d="M33 166L346 8"></path>' in chart
    assert chart.count("<circle") == 2 and "band" not in chart


def test_extremes_make_a_band():
    chart = line_chart("x", [curve("x", [(1, 0.0), (2, 1.0), (3, 0.5), (4, 0.5)], width=2)], "share")
    assert re.findall(r'class="band f0" d="([^"]+)"', chart) == [
        "M91 8L295 87L295 87L91 166Z"
    ]  # points at 1.5 and 3.5 of 1 … 4
    assert "rollouts 1 to 2\nx 50 % (0 % to 100 %)" in chart and "rollouts 3 to 4\nx 50 %<" in chart


def test_a_chart_says_what_it_shows():
    chart = line_chart("Length", [curve("all <b>", [(1, 20.0), (2, 30.0)])], "tokens")
    assert "<title>Length</title>" in chart and 'role="img"' in chart
    assert "all &lt;b&gt;: 20 at rollout 1, 30 at rollout 2, from 20 to 30" in chart
    assert "values were not finite" not in chart
    assert "mean: 1 values were not finite" in line_chart("x", [curve("mean", [(1, 1.0), (2, None)])], "")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.07, [0.0, 0.02, 0.04, 0.06, 0.08]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (0.0, 0.0, [0.0]),
    ],
)
def test_ticks(low, high, expected):
    assert _ticks(low, high, whole=False) == pytest.approx(expected)


def test_ticks_of_rollouts_are_whole():
    assert _ticks(1, 3, whole=True) == [1, 2, 3]
    assert _ticks(0, 1000, whole=True) == [0, 200, 400, 600, 800, 1000]


def test_labels_differ_where_values_do():
    assert tick_labels([24.0, 24.005]) == ["24", "24.005"]
    assert tick_labels([0.0, 0.25], share=True) == ["0%", "25%"]
    assert tick_labels([0.0, 2e6]) == ["0", "2M"]
    assert tick_labels([0.0, 5e-06]) == ["0", "5e-06"]


@pytest.mark.parametrize("values", [[(1, 0.0)], [(1, 0.0), (2, 0.0)], [(5, -3.0)], [(0, 1e-12), (1, 2e9)]])
def test_any_curve_can_be_drawn(values):
    for unit in ("", "share"):
        assert "<svg" in line_chart("x", [curve("x", values)], unit)


def test_areas_fill_the_height():
    chart = share_chart("Time", ["a", "b"], [(1, 1), (2, 2)], [[0.25, 0.75], [0.5, 0.5]])
    areas = re.findall(r'class="f\d" d="([^"]+)"', chart)
    assert areas == ["M40 126.5L346 87L346 166L40 166Z", "M40 8L346 8L346 87L40 126.5Z"]
    assert "a 37.5 % on average" in chart
    assert "<path" in share_chart("Time", ["a"], [(1, 1)], [[1.0]])
