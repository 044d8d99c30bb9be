"""Which metrics a page draws, and which of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdrl_pl.report.charts import line_chart, share_chart
from kdrl_pl.report.curves import Curve, bucket_width, curve, of_metric, phase_shares
from kdrl_pl.report.html import Markup, element
from kdrl_pl.report.run import Run

PHASES = ("rollout", "reward", "teacher", "score", "update")


@dataclass(frozen=True)
class Figure:
    """Metrics of one chart.

    Args:
        title: of the chart.
        metrics: metric -> label; the first is the one that a comparison of runs draws.
        unit: as in metric_names.py; "share" is written as per cent.
    """

    title: str
    metrics: dict[str, str]
    unit: str = ""


FIGURES = (
    Figure("Correct responses", {"reward/correct": "correct", "rollout/pass_at_k": "groups with a right one"}, "share"),
    Figure("Reward", {"reward/mean": "mean", "reward/std": "deviation within groups"}),
    Figure(
        "KL to the teacher",
        {"teacher/reverse_kl": "of the tokens that are distilled", "teacher/reverse_kl_k3": "the same by k3"},
        "nats per token",
    ),
    Figure(
        "Length of a response",
        {"rollout/length": "all", "rollout/length_correct": "right", "rollout/length_incorrect": "wrong"},
        "tokens",
    ),
    Figure("Entropy", {"rollout/entropy": "of the sampler", "train/entropy": "of the student"}, "nats per token"),
    Figure("Norm of the gradient", {"train/grad_norm": "before clipping"}),
    Figure("Cut off at the token budget", {"rollout/truncated": "truncated"}, "share"),
    Figure(
        "Groups",
        {
            "rollout/groups_no_signal": "no signal",
            "rollout/groups_all_wrong": "all wrong",
            "rollout/groups_all_correct": "all right",
        },
        "share",
    ),
    Figure("Loss", {"train/loss": "all", "train/pg_loss": "policy gradient", "train/kd_loss": "distillation"}),
    Figure("Pull of the teacher over that of the reward", {"train/kd_to_rl": "β·|f(d)| / |Â|"}),
    Figure("Reward and teacher pull in opposite directions", {"train/sign_conflict": "tokens"}, "share"),
    Figure("Tokens that are distilled", {"teacher/kd_tokens": "tokens"}, "share"),
    Figure("Ratio clipped", {"train/clip_fraction": "tokens"}, "share"),
    Figure("Learning rate", {"train/lr": "of the last update"}),
    Figure("Skipped optimizer steps", {"train/skipped_steps": "so far"}, "steps"),
    Figure(
        "Sampler against trainer",
        {"rollout/sampler_drift_max": "largest", "rollout/sampler_drift_mean": "mean"},
        "nats",
    ),
    Figure(
        "Rewards that failed",
        {"reward/errors": "errors", "reward/unparsable": "no answer read", "reward/timeout": "time-outs"},
        "share",
    ),
    Figure(
        "Speed",
        {
            "perf/rollout_tokens_per_s": "sampling",
            "perf/update_tokens_per_s": "update",
            "perf/teacher_tokens_per_s": "teacher",
        },
        "tokens per second",
    ),
)
# Drawn only where some value is not 0: most runs never see one.
_RARE = {"Skipped optimizer steps", "Rewards that failed", "Ratio clipped"}


def run_figures(run: Run) -> list[Markup]:
    """The charts of one run; those without a value are left out."""
    rows = [(run.position(row), row) for row in run.training]
    width = bucket_width(run.done)

    def drawn(figure: Figure) -> Markup | None:
        curves = [curve(label, of_metric(rows, name), width) for name, label in figure.metrics.items()]
        return _chart(figure, curves, run.counter)

    others = {name: name.removeprefix("train/") for _, row in rows for name in row if _is_coefficient(name)}
    parts = {name: name.removeprefix("reward/") for _, row in rows for name in row if _is_part(name)}
    made = [
        _validation(run, "Validation: correct, mean over samples", "avg_at_k"),
        *map(drawn, FIGURES[:2]),
        drawn(Figure("Rewards by part", parts)) if parts else None,
        *map(drawn, FIGURES[2:5]),
        drawn(Figure("Coefficients", _named(others))) if others else None,
        *map(drawn, FIGURES[5:10]),
        _times(run, rows, width),
        *map(drawn, FIGURES[10:]),
        _validation(run, "Validation: length of a response", "length", "tokens"),
        _validation(run, "Validation: KL to the teacher", "kl_teacher", "nats per token"),
        _validation(run, "Validation: loss", "", ""),
    ]
    return [chart for chart in made if chart is not None]


def compared_figures(runs: Sequence[tuple[str, Run]]) -> list[Markup]:
    """The charts of several runs over each other, one line per run.

    Args:
        runs: (label, run).
    """
    width = bucket_width(max(run.done for _, run in runs))
    counter = runs[0][1].counter
    made = []
    for metric in sorted({name for _, run in runs for name in _set_metrics(run, "avg_at_k")}):
        curves = [curve(label, _validated(run, metric)) for label, run in runs]
        title = f"Validation: correct of {metric.split('/', 1)[1].rpartition('/')[0] or 'all sets'}"
        made.append(_chart(Figure(title, {}, "share"), curves, counter))
    coefficients = {name: "" for _, run in runs for row in run.training for name in row if _is_coefficient(name)}
    figures = [*FIGURES, *(Figure(f"Coefficient of {name[6:-5]}", {name: ""}) for name in sorted(coefficients))]
    seconds = Figure("Seconds per rollout", {"time/step": ""}, "s")
    for figure in [*figures, seconds]:
        name = next(iter(figure.metrics))
        curves = [
            curve(label, of_metric([(run.position(row), row) for row in run.training], name), width)
            for label, run in runs
        ]
        of = f": {figure.metrics[name]}" if len(figure.metrics) > 1 else ""
        made.append(_chart(Figure(f"{figure.title}{of}", {}, figure.unit), curves, counter))
    return [chart for chart in made if chart is not None]


def _chart(figure: Figure, curves: Sequence[Curve], counter: str) -> Markup | None:
    drawn = [c for c in curves if c.points]
    if not drawn or (figure.title.partition(":")[0] in _RARE and not any(p.high for c in drawn for p in c.points)):
        return None
    return line_chart(figure.title, curves, figure.unit, counter)


def _times(run: Run, rows: Any, width: int) -> Markup | None:
    phases = [phase for phase in PHASES if any(f"time/{phase}" in row for _, row in rows)]
    spans, shares = phase_shares(rows, phases, width)
    if not spans or not phases:
        return None
    seconds = sum(row.get("time/step") or 0.0 for _, row in rows)
    note = f"{seconds:,.0f} s in all {len(rows):,} {run.counter}s, validation not counted"
    return share_chart("Where the time goes", [*phases, "other"], spans, shares, run.counter, note)


def _validation(run: Run, title: str, metric: str, unit: str = "share") -> Markup | None:
    """One line per set; the loss of kdrl sft where `metric` is empty."""
    if not metric:
        return _chart(Figure(title, {}, unit), [curve("loss", _validated(run, "val/loss"))], run.counter)
    curves = [
        curve(name.split("/", 1)[1].rpartition("/")[0], _validated(run, name)) for name in _set_metrics(run, metric)
    ]
    return _chart(Figure(title, {}, unit), curves, run.counter)


def _set_metrics(run: Run, metric: str) -> list[str]:
    """`val/<set>/<metric>` of every set."""
    names = {name: None for row in run.validations for name in row}
    names |= {f"val/{of}/{metric}": None for of in run.before or {}}
    return [name for name in names if name.startswith("val/") and name.endswith(f"/{metric}") and name.count("/") > 1]


def _validated(run: Run, name: str) -> list[tuple[float, float | None]]:
    values = of_metric([(run.position(row), row) for row in run.validations], name)
    _, _, rest = name.partition("/")
    of, _, metric = rest.rpartition("/")
    before = (run.before or {}).get(of, {}).get(metric)
    return values if before is None else [(0, before), *values]


def _is_coefficient(name: str) -> bool:
    return name.startswith("train/") and name.endswith("_coef")


def _is_part(name: str) -> bool:
    known = {"reward/mean", "reward/std", "reward/correct", "reward/errors", "reward/unparsable", "reward/timeout"}
    return name.startswith("reward/") and name not in known


def _named(names: dict[str, str]) -> dict[str, str]:
    said = {"pg_coef": "a, policy gradient", "kd_coef": "β, distillation"}
    return {name: said.get(label, label.removesuffix("_coef")) for name, label in names.items()}


def chart_grid(charts: Sequence[Markup]) -> Markup:
    """Charts beside each other as far as the screen is wide."""
    return element("div", list(charts), class_="charts")
