"""What came of a run, for people and for summary.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def build_summary(
    before: Mapping[str, Mapping[str, float]] | None,
    after: Mapping[str, Mapping[str, float]],
    *,
    seconds: float,
    tokens: int,
    **more: Any,
) -> dict[str, Any]:
    """What `fit` leaves in summary.json: `{"val": {"before": {set: metrics}, "after": …}, "seconds": …, "tokens": …}`.

    Args:
        before: set -> what `EvaluationMetrics.compute` gave before the first update; None when it was not measured.
        after: the same after the last one.
        seconds: wall clock of the training.
        tokens: response tokens sampled for training, all ranks.
        more: further entries beside these.
    """
    val = {
        "before": None if before is None else {name: dict(metrics) for name, metrics in before.items()},
        "after": {name: dict(metrics) for name, metrics in after.items()},
    }
    return {"val": val, "seconds": seconds, "tokens": tokens, **more}


def mean_over_sets(results: Mapping[str, Mapping[str, float]], name: str = "avg_at_k") -> float | None:
    """Plain mean of one metric over the sets that have it, each set counted once; None when none has it."""
    values = [metrics[name] for metrics in results.values() if name in metrics]
    return math.fsum(values) / len(values) if values else None


_WIDTH = 80  # columns of the table
# column of the table -> (metric, how it is written); that of pass@k is the `pass_at_<k>` with the largest k
_SHARE: Callable[[float], str] = "{:.1%}".format
_TABLE: dict[str, tuple[str, Callable[[float], str]]] = {
    "avg@k": ("avg_at_k", _SHARE),
    "pass@k": ("", _SHARE),
    "maj@k": ("maj_at_k", _SHARE),
    "length": ("length", lambda value: f"{value:.1f}" if value < 1000 else f"{value:.0f}"),
    "trunc.": ("truncated", _SHARE),
    "KL/tok": ("kl_teacher", lambda value: f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"),
    "acc/1k": ("accuracy_per_1k_tokens", lambda value: f"{value:.3f}" if value < 10 else f"{value:.1f}"),
}


def format_table(before: Mapping[str, Mapping[str, float]] | None, after: Mapping[str, Mapping[str, float]]) -> str:
    """Validation results as plain text: one line per set, two with `before`, the mean of avg@k over several sets.

    Args:
        before: set -> what `EvaluationMetrics.compute` gave before training; None for one line per set.
        after: the same now.

    Returns:
        The lines, without a newline at the end; long names of sets are cut to fit into 80 columns. pass@k is that of
        the largest k; `-` means not measured.
    """
    sides = [("", after)] if before is None else [("before", before), ("after", after)]
    largest = {_largest_pass(metrics) for _, side in sides for metrics in side.values()} - {0}
    pass_head = f"pass@{max(largest)}" if len(largest) == 1 else "pass@k"
    rows = [["set", "", *(pass_head if head == "pass@k" else head for head in _TABLE)]]
    for name in dict.fromkeys(name for _, side in sides for name in side):
        rows += [[name, when, *_cells(side.get(name, {}))] for when, side in sides]
    if len(after) > 1:
        means = [(when, mean_over_sets(side)) for when, side in sides]
        rows += [["mean", when, *_cells({} if mean is None else {"avg_at_k": mean}, "")] for when, mean in means]

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(3, min(widths[0], _WIDTH - sum(w + 2 for w in widths[1:] if w)))
    lines = []
    for name, when, *cells in rows:
        name = name if len(name) <= widths[0] else name[: widths[0] - 3] + "..."
        cells = [text.rjust(size) for text, size in zip(cells, widths[2:], strict=True)]
        heads = ["" if when == "after" else name, when]
        heads = [text.ljust(size) for text, size in zip(heads, widths, strict=False) if size]
        lines.append("  ".join([*heads, *cells]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _largest_pass(metrics: Mapping[str, float]) -> int:
    """The largest k of the `pass_at_<k>` in `metrics`, 0 without any."""
    return max((int(key.removeprefix("pass_at_")) for key in metrics if key.startswith("pass_at_")), default=0)


def _cells(metrics: Mapping[str, float], absent: str = "-") -> list[str]:
    keys = [(f"pass_at_{_largest_pass(metrics)}" if head == "pass@k" else key) for head, (key, _) in _TABLE.items()]
    texts = [write for _, write in _TABLE.values()]
    return [write(metrics[key]) if key in metrics else absent for key, write in zip(keys, texts, strict=True)]
