"""Learning curves of a study, per rollout and per second of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl_pl.study.statistics import estimate
from kdrl_pl.study.tables import Entries

# Okabe and Ito's colours, told apart by colour-blind readers too; further arms repeat them with another line
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_LINES = ("-", "--", ":", "-.")
_WITH_BANDS = 5  # more arms than these would hide each other


class NoPlotError(RuntimeError):
    """The curves cannot be drawn here; everything else of a study can go on."""


def draw(testbeds: Mapping[str, Entries], file: Path) -> None:
    """Draw one row per testbed: pass@1 over rollouts, and over seconds of training; mean over seeds.

    Few arms have their 95 % t-interval shaded.

    Args:
        testbeds: name -> arm -> lists per seed; an arm has the same line in all of them.
        file: .svg or .png.

    Raises:
        NoPlotError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise NoPlotError("matplotlib is not installed, so no plot: pip install 'kdrl_pl[study]'") from None
    arms = list(dict.fromkeys(arm for entries in testbeds.values() for arm in entries))
    styles = {
        arm: {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _LINES[i // len(_COLOURS) % len(_LINES)]}
        for i, arm in enumerate(arms)
    }
    height = 2.7 * len(testbeds) + 0.25 * -(-len(arms) // 4) + 0.3
    settings: dict[Any, Any] = {"svg.hashsalt": "kdrl", "font.size": 9, "axes.spines.top": False}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings, "axes.spines.right": False}):
        figure = Figure(figsize=(9, height), layout="constrained", facecolor="white")
        panels = figure.subplots(len(testbeds), 2, squeeze=False, sharey="row")
        lines: dict[str, Any] = {}
        for (left, right), (testbed, entries) in zip(panels, testbeds.items(), strict=True):
            for arm, entry in entries.items():
                lines[arm] = _draw_arm(left, right, entry["curve"], styles[arm], len(arms) <= _WITH_BANDS)
            left.set(title=testbed, xlabel="rollouts", ylabel="pass@1 [%]")
            right.set(title=testbed, xlabel="seconds of training")
            for axes in (left, right):
                axes.grid(color="#DDDDDD", linewidth=0.6)
                axes.set_xlim(left=0)
        legend = [lines[arm] for arm in arms]
        figure.legend(legend, arms, loc="outside lower center", ncols=4, frameon=False)
        metadata = {"Date": None} if file.suffix == ".svg" else None  # so that the same curves give the same file
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, metadata=metadata)


def _draw_arm(left: Any, right: Any, curves: list[Any], style: Mapping[str, Any], band: bool) -> Any:
    """Draw the mean over the seeds, at the rollouts where all of them were validated; returns its line."""
    places = [{rollout: i for i, rollout in enumerate(curve["rollouts"])} for curve in curves]
    rollouts = [rollout for rollout in places[0] if all(rollout in place for place in places)]

    def at(rollout: int, name: str) -> list[float]:
        return [curve[name][place[rollout]] for curve, place in zip(curves, places, strict=True)]

    shares = [estimate(at(rollout, "pass@1")) for rollout in rollouts]
    seconds = [estimate(at(rollout, "seconds")).mean for rollout in rollouts]
    for axes, x in ((right, seconds), (left, rollouts)):
        (line,) = axes.plot(x, [100 * share.mean for share in shares], linewidth=1.5, **style)
        if band and len(curves) > 1:
            ends = ([100 * (share.mean + sign * share.half) for share in shares] for sign in (-1, 1))
            low, high = ([min(max(end, 0.0), 100.0) for end in side] for side in ends)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    return line
