"""Charts as inline SVG: vector paths whose colours the style sheet gives, so that they follow light and dark.

Every chart says in words what it shows; pointing at a place shows the numbers there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from kdrl_pl.report.curves import Curve, Point
from kdrl_pl.report.html import Markup, element

WIDTH, HEIGHT = 360, 200  # near what a phone gives a chart, so that its text of 12 px stays about that size
_RIGHT, _TOP, _BOTTOM = 14, 8, 34  # margins; the left one is as wide as its labels
_DOTS = 40  # a curve of at most so many points shows them


def number(value: float | None, share: bool = False) -> str:
    """A value in at most about six characters; a dash for one that was not finite.

    >>> number(0.1234567), number(1234567.0), number(0.125, share=True)
    ('0.1235', '1.235e+06', '12.5 %')
    """
    if value is None:
        return "–"
    return f"{100 * value:.3g} %" if share else f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def tick_labels(ticks: Sequence[float], share: bool = False) -> list[str]:
    """Labels of an axis, as short as they can be while they differ.

    >>> tick_labels([24.0, 24.005, 24.01]), tick_labels([0.0, 50000.0]), tick_labels([0.0, 0.5], share=True)
    (['24', '24.005', '24.01'], ['0', '50k'], ['0%', '50%'])
    """
    values = [100 * tick if share else tick for tick in ticks]
    step = max(abs(value) for value in values)
    unit, letter = (1e6, "M") if step >= 1e6 else (1e3, "k") if step >= 1e4 else (1.0, "")
    labels: list[str] = []
    for digits in range(3, 12):
        labels = [f"{value / unit:.{digits}g}" for value in values]
        if len(set(labels)) == len(labels) and all(
            math.isclose(float(label), value / unit, abs_tol=1e-3 * step / unit / len(values))
            for label, value in zip(labels, values, strict=True)
        ):
            break
    return [label if label == "0" and not share else f"{label}{'%' if share else letter}" for label in labels]


def line_chart(title: str, curves: Sequence[Curve], unit: str, counter: str = "rollout") -> Markup:
    """A figure with one line per curve, and a band between the extremes where a point stands for several rollouts.

    Args:
        title: of the figure.
        curves: at least one of them with points; the others keep their colours for themselves.
        unit: of the values; "share" writes them as per cent.
        counter: what the horizontal axis counts, "rollout" or "step".
    """
    share = unit == "share"
    curves, colours = _with_points(curves)
    points = [point for curve in curves for point in curve.points]
    ticks = _ticks(*_range(min(p.low for p in points), max(p.high for p in points), share), whole=False)
    first, last = min(p.first for p in points), max(p.last for p in points)
    labels = tick_labels(ticks, share)
    left = _left(labels)
    x, y = _scale(first, last, left, WIDTH - _RIGHT), _scale(ticks[0], ticks[-1], HEIGHT - _BOTTOM, _TOP)
    drawn = []
    for i, curve in zip(colours, curves, strict=True):
        if any(p.low < p.high for p in curve.points):
            edge = [(x(p.x), y(p.high)) for p in curve.points] + [(x(p.x), y(p.low)) for p in reversed(curve.points)]
            drawn.append(element("path", class_=f"band f{i}", d=_path(edge, close=True)))
    for i, curve in zip(colours, curves, strict=True):
        places = [(x(p.x), y(p.mean)) for p in curve.points]
        if len(places) > 1:
            drawn.append(element("path", class_=f"line s{i}", d=_path(places)))
        if len(places) <= _DOTS:
            drawn += [element("circle", class_=f"f{i}", cx=_round(a), cy=_round(b), r=2.4) for a, b in places]
    rows = [(y(tick), label) for tick, label in zip(ticks, labels, strict=True)]
    axes = _axes(left, [(x(tick), f"{tick:g}") for tick in _ticks(first, last, whole=True)], rows, counter)
    hits = _hits(curves, x, share, counter)
    words = [_in_words(curve, share, counter) for curve in curves]
    missing = [f"{curve.label}: {curve.missing} values were not finite" for curve in curves if curve.missing]
    return _figure(
        title,
        "" if share else unit,
        [axes, drawn, hits],
        list(zip(colours, (c.label for c in curves), strict=True)),
        words,
        "; ".join(missing),
    )


def share_chart(
    title: str,
    labels: Sequence[str],
    spans: Sequence[tuple[float, float]],
    shares: Sequence[Sequence[float]],
    counter: str = "rollout",
    note: str = "",
) -> Markup:
    """A figure with areas on top of each other that fill the height.

    Args:
        title: of the figure.
        labels: of the areas, from below.
        spans: (first, last) rollouts of each column.
        shares: per column one share per label; they sum to 1.
        counter: see `line_chart`.
        note: a sentence below.
    """
    first, last = spans[0][0], spans[-1][1]
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    left = _left(tick_labels(ticks, True))
    x, y = _scale(first, last, left, WIDTH - _RIGHT), _scale(0.0, 1.0, HEIGHT - _BOTTOM, _TOP)
    middles = [(a + b) / 2 for a, b in spans]
    if len(spans) == 1:  # a column needs a width
        middles, shares = [first - 0.5, last + 0.5], [shares[0], shares[0]]
        x = _scale(first - 0.5, last + 0.5, left, WIDTH - _RIGHT)
    drawn, hits = [], []
    for i in range(len(labels)):
        above = [(x(m), y(min(math.fsum(column[: i + 1]), 1.0))) for m, column in zip(middles, shares, strict=True)]
        below = [(x(m), y(min(math.fsum(column[:i]), 1.0))) for m, column in zip(middles, shares, strict=True)]
        drawn.append(element("path", class_=f"f{i}", d=_path([*above, *reversed(below)], close=True)))
    for (a, b), column in zip(spans, shares, strict=False):
        lines = [f"{label} {number(value, True)}" for label, value in zip(labels, column, strict=True)]
        hits.append(_hit(x(a), x(b), [f"{_span(a, b, counter)}", *reversed(lines)]))
    rows = [(y(tick), label) for tick, label in zip(ticks, tick_labels(ticks, True), strict=True)]
    axes = _axes(left, [(x(tick), f"{tick:g}") for tick in _ticks(first, last, whole=True)], rows, counter)
    totals = [math.fsum(column[i] for column in shares) / len(shares) for i in range(len(labels))]
    words = [f"{label} {number(total, True)} on average" for label, total in zip(labels, totals, strict=True)]
    return _figure(title, "", [drawn, axes, hits], list(enumerate(labels)), words, note)


def _with_points(curves: Sequence[Curve]) -> tuple[list[Curve], list[int]]:
    """The curves that can be drawn, and the colour of each: its place among all."""
    drawn = [(i, curve) for i, curve in enumerate(curves) if curve.points]
    return [curve for _, curve in drawn], [i for i, _ in drawn]


def _figure(
    title: str, unit: str, content: object, labels: Sequence[tuple[int, str]], words: Sequence[str], note: str
) -> Markup:
    image = element(
        "svg",
        element("title", title),
        element("desc", "; ".join(words)),
        content,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )
    keys = [element("li", element("span", class_=f"key b{i}", aria_hidden="true"), label) for i, label in labels]
    return element(
        "figure",
        element("h3", title, element("span", f" [{unit}]", class_="note") if unit else None),
        image,
        element("ul", keys, class_="legend"),
        element("figcaption", note) if note else None,
    )


def _left(labels: Sequence[str]) -> float:
    """Room for the labels of the vertical axis."""
    return 12.0 + 7.0 * max(map(len, labels))


def _axes(
    left: float, columns: Iterable[tuple[float, str]], rows: Iterable[tuple[float, str]], counter: str
) -> list[Markup]:
    """Lines and labels; `columns` and `rows` are (place, label)."""
    drawn = []
    for place, label in rows:
        drawn.append(element("path", class_="grid", d=f"M{_round(left)} {_round(place)}H{WIDTH - _RIGHT}"))
        drawn.append(element("text", label, x=_round(left - 6), y=_round(place + 4), text_anchor="end"))
    for place, label in columns:
        drawn.append(element("path", class_="grid", d=f"M{_round(place)} {HEIGHT - _BOTTOM}v4"))
        drawn.append(element("text", label, x=_round(place), y=HEIGHT - _BOTTOM + 16, text_anchor="middle"))
    middle = _round((left + WIDTH) / 2)
    drawn.append(element("text", f"{counter}s", x=middle, y=HEIGHT - 4, text_anchor="middle"))
    return drawn


def _hits(curves: Sequence[Curve], x: Callable[[float], float], share: bool, counter: str) -> list[Markup]:
    """Invisible columns that show the numbers of all curves at their place."""
    at: dict[float, list[tuple[str, Point]]] = {}
    for curve in curves:
        for point in curve.points:
            at.setdefault(point.x, []).append((curve.label, point))
    hits = []
    for place in sorted(at):
        first, last = min(p.first for _, p in at[place]), max(p.last for _, p in at[place])
        lines = [_span(first, last, counter)]
        for label, p in at[place]:
            extremes = f" ({number(p.low, share)} to {number(p.high, share)})" if p.low < p.high else ""
            lines.append(f"{label} {number(p.mean, share)}{extremes}")
        hits.append(_hit(x(first), x(last), lines))
    return hits


def _hit(left: float, right: float, lines: Sequence[str]) -> Markup:
    place = {"x": _round(left - 1.5), "width": _round(right - left + 3), "y": _TOP, "height": HEIGHT - _TOP - _BOTTOM}
    return element("rect", element("title", "\n".join(lines)), class_="hit", **place)


def _span(first: float, last: float, counter: str) -> str:
    return f"{counter} {first:g}" if first == last else f"{counter}s {first:g} to {last:g}"


def _in_words(curve: Curve, share: bool, counter: str) -> str:
    start, end = curve.points[0], curve.points[-1]
    low, high = min(p.low for p in curve.points), max(p.high for p in curve.points)
    return (
        f"{curve.label}: {number(start.mean, share)} at {_span(start.first, start.last, counter)}, "
        f"{number(end.mean, share)} at {_span(end.first, end.last, counter)}, "
        f"from {number(low, share)} to {number(high, share)}"
    )


def _range(low: float, high: float, share: bool) -> tuple[float, float]:
    """What the vertical axis shows: from 0 where the values come near it, never nothing."""
    if 0 < low <= high / 2 or low == high > 0:
        low = 0.0
    if low == high:
        return (0.0, 1.0) if share else (low - 1.0, high + 1.0)
    return low, high


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    """About four round numbers; from the last below `low` to the first above `high`, or between them if `whole`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4)) if high > low else 1.0
    step = next(step * m for m in (1, 2, 5, 10, 20) if step * m * 5 >= high - low)
    if whole:
        step = max(step, 1.0)
        return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    tolerance = 1e-9
    start, end = math.floor(low / step + tolerance), math.ceil(high / step - tolerance)
    return [round(i * step, 12) for i in range(start, end + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _path(places: Sequence[tuple[float, float]], close: bool = False) -> str:
    return "M" + "L".join(f"{_round(a)} {_round(b)}" for a, b in places) + ("Z" if close else "")


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
