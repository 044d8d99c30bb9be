"""Results of a study as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kdrl_pl.study.statistics import Estimate, estimate, paired_difference

_COURSE = "on the way"

Entries = Mapping[str, Mapping[str, Any]]  # arm -> lists per seed, as in `Results`


@dataclass(frozen=True)
class _Column:
    """A figure of a table; numbers are shown times `scale`, with `digits` after the point, and `unit` behind."""

    name: str
    scale: float
    digits: int
    unit: str

    def number(self, value: float, sign: str = "") -> str:
        rounded = round(value * self.scale, self.digits) or 0.0  # no minus before a zero
        return f"{rounded:{sign if rounded else ''},.{self.digits}f}".replace("-", "−")


def arms_table(entries: Entries) -> str:
    """One row per arm: means over seeds ± half of the 95 % t-interval, and what the table says of its making.

    Args:
        entries: of one testbed, in the order of the rows.
    """
    if not entries:
        return "No results yet."
    entries = _with_course(entries)
    columns = _columns(entries)
    rows = []
    for arm, entry in entries.items():
        shares = [teacher / all_ for teacher, all_ in zip(entry["teacher_seconds"], entry["seconds"], strict=True)]
        cells = [_mean(column, entry) for column in columns]
        rows.append([arm, str(len(entry["seeds"])), *cells, f"{estimate(shares).mean:.0%}"])
    heads = [f"{column.name} [{column.unit}]" for column in columns]
    return _table(["arm", "seeds", *heads, "teacher's share"], rows) + "\n\n" + _note(entries)


def differences_table(entries: Entries, pairs: Iterable[tuple[str, str]]) -> str:
    """One row per pair: mean difference paired by seed, and its 95 % t-interval; "tie" when that contains 0.

    Seconds are compared where both runs of every seed were made on the same machine.

    Args:
        entries: of one testbed.
        pairs: (arm, arm it is compared with); pairs without results are left out.
    """
    entries = _with_course(entries)
    columns = _columns(entries)
    rows = []
    for first, second in pairs:
        if first in entries and second in entries:
            differences = {column: _difference(column, entries[first], entries[second]) for column in columns}
            known = {column: value for column, value in differences.items() if value is not None}
            if known:
                seeds = str(next(iter(known.values())).n)
                cells = [_interval(column, known[column]) if column in known else "" for column in columns]
                rows.append([f"{first} − {second}", seeds, *cells])
    if not rows:
        return "No results yet."
    heads = [f"{column.name} [{'points' if column.unit == '%' else column.unit}]" for column in columns]
    return _table(["difference", "seeds", *heads], rows)


def _with_course(entries: Entries) -> Entries:
    """`entries` with the mean of pass@1 over the course of each run, on straight lines between its validations.

    An arm that gets to the same end sooner has more of it. Arms that were validated less than three times have none.
    """

    def course(curve: Mapping[str, Any]) -> float:
        done, shares = curve["rollouts"], curve["pass@1"]
        areas = ((done[i + 1] - done[i]) * (shares[i + 1] + shares[i]) / 2 for i in range(len(done) - 1))
        return sum(areas) / (done[-1] - done[0])

    return {
        arm: {**entry, _COURSE: [course(curve) for curve in entry["curve"]]}
        if all(len(curve["rollouts"]) > 2 for curve in entry["curve"])
        else entry
        for arm, entry in entries.items()
    }


def _columns(entries: Entries) -> list[_Column]:
    """Those of the figures that any arm has, so pass@8 where 8 samples were drawn."""
    names = dict.fromkeys(name for entry in entries.values() for name in entry)
    shares = [_Column(name, 100.0, 1, "%") for name in names if name.startswith("pass@") or name == _COURSE]
    others = [_Column("length", 1.0, 1, "tokens"), _Column("seconds", 1.0, 0, "s"), _Column("tokens", 1e-3, 0, "1,000")]
    return [*shares, *others]


def _difference(column: _Column, first: Mapping[str, Any], second: Mapping[str, Any]) -> Estimate | None:
    sides = [dict(zip(entry["seeds"], entry.get(column.name, ()), strict=False)) for entry in (first, second)]
    if column.name == "seconds":
        ran, other = (dict(zip(entry["seeds"], entry["machine"], strict=True)) for entry in (first, second))
        if any(ran[seed] != other.get(seed, ran[seed]) for seed in ran):
            return None  # seconds of two machines say nothing
    return paired_difference(*sides)


def _mean(column: _Column, entry: Mapping[str, Any]) -> str:
    if column.name not in entry:
        return ""
    value = estimate(entry[column.name])
    mean = column.number(value.mean)
    return mean if value.half is None else f"{mean} ± {column.number(value.half)}"


def _interval(column: _Column, value: Estimate) -> str:
    mean = column.number(value.mean, "+")
    if value.half is None:
        return f"{mean} (one seed)"
    ends = " … ".join(column.number(end, "+") for end in (value.mean - value.half, value.mean + value.half))
    return f"tie: {mean} ({ends})" if value.is_tie else f"**{mean}** ({ends})"


def _note(entries: Entries) -> str:
    def distinct(of: Callable[[Mapping[str, Any]], Iterable[Any]]) -> list[Any]:
        return sorted({item for entry in entries.values() for item in of(entry)})

    starts = [curve["pass@1"][0] for entry in entries.values() for curve in entry["curve"] if curve["rollouts"][0] == 0]
    start = f" The student starts at {100 * estimate(starts).mean:.1f} %." if starts else ""
    rollouts = " or ".join(map(str, distinct(lambda entry: [entry["rollouts"]])))
    machines = "; ".join(distinct(lambda entry: entry["machine"]))
    return f"Mean over seeds ± half of the 95 % t-interval; {rollouts} rollouts.{start} Made on {machines}."


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
