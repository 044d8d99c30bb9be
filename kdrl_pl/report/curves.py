"""Metrics of a run as curves of at most so many points, whatever its length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

POINTS = 160  # of a curve: more cannot be told apart at the width of a chart


@dataclass(frozen=True)
class Point:
    """One or several rollouts of a curve that lie side by side.

    Args:
        first, last: the rollouts it stands for.
        mean, low, high: of the metric over them.
    """

    first: float
    last: float
    mean: float
    low: float
    high: float

    @property
    def x(self) -> float:
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class Curve:
    """One metric over rollouts.

    Args:
        label: its name in the legend.
        points: from left to right; those of several rollouts know the extremes among them.
        missing: values that were not finite, and are not in `points`.
    """

    label: str
    points: Sequence[Point]
    missing: int = 0


def bucket_width(last: float) -> int:
    """Rollouts per point, so that `POINTS` reach until rollout `last`."""
    return max(1, math.ceil(last / POINTS))


def curve(label: str, values: Iterable[tuple[float, float | None]], width: int = 1) -> Curve:
    """The curve of (rollout, value) in the order of the rollouts; a value that was not finite is None.

    Args:
        label: its name.
        values: rollouts counted from 1, so that the first bucket is 1 ... `width`; validations may have 0.
        width: rollouts per point.
    """
    known, missing = [], 0
    for x, value in values:
        if value is None or not math.isfinite(value):
            missing += 1
        else:
            known.append((x, float(value)))
    points = []
    for _, group in groupby(known, key=lambda pair: math.ceil(pair[0] / width)):
        pairs = list(group)
        ys = [y for _, y in pairs]
        points.append(Point(pairs[0][0], pairs[-1][0], math.fsum(ys) / len(ys), min(ys), max(ys)))
    return Curve(label, points, missing)


def of_metric(rows: Iterable[tuple[float, Mapping[str, Any]]], name: str) -> list[tuple[float, float | None]]:
    """(rollout, value) of the rows that have the metric."""
    return [(x, row[name]) for x, row in rows if name in row]


def phase_shares(
    rows: Sequence[tuple[float, Mapping[str, Any]]], phases: Sequence[str], width: int = 1
) -> tuple[list[tuple[float, float]], list[list[float]]]:
    """Spans of rollouts, and for each the share of every phase in its seconds; the last share is what is left over.

    Args:
        rows: (rollout, metrics) with `time/step` and `time/<phase>` in seconds.
        phases: names; a row may lack some.
        width: rollouts per span.
    """
    timed = [(x, row) for x, row in rows if row.get("time/step")]
    spans, shares = [], []
    for _, group in groupby(timed, key=lambda pair: math.ceil(pair[0] / width)):
        pairs = list(group)
        total = math.fsum(row["time/step"] for _, row in pairs)
        spent = [math.fsum(row.get(f"time/{phase}") or 0.0 for _, row in pairs) / total for phase in phases]
        spans.append((pairs[0][0], pairs[-1][0]))
        shares.append([*spent, max(1.0 - math.fsum(spent), 0.0)])
    return spans, shares
