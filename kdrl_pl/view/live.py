"""A run on a terminal: a few lines that are drawn anew, and above them whatever is printed or logged meanwhile."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdrl_pl.phases import PHASES
from kdrl_pl.text import printable
from kdrl_pl.view.completions import Shown, one_line
from kdrl_pl.view.plain import SHOWN
from kdrl_pl.view.state import RunState, duration

_WIDTH = 96  # columns at most; narrower lines survive it when a terminal is made narrower
_NARROW = 72  # columns below which the phases that are not running are left out
_SPARKS = "▁▂▃▄▅▆▇█"
_PIECES = 30  # characters of a course at most


class LiveView:
    """Draws a `RunState` four times a second from a thread of its own.

    Args:
        state: of the run.
        console: where; None is the terminal that stdout is.
    """

    def __init__(self, state: RunState, console: Console | None = None) -> None:
        self.state = state
        self.console = console or Console(highlight=False)
        self._live: Live | None = None
        self._streams: list[tuple[logging.StreamHandler, object]] = []

    def start(self) -> None:
        """Begin to draw; what is printed and logged from now on appears above."""
        if self._live is not None:
            return
        self._live = Live(
            console=self.console,
            get_renderable=lambda: render(self.state, self.console.width),
            refresh_per_second=4,
            transient=True,
            vertical_overflow="crop",
            redirect_stderr=sys.stderr.isatty(),
        )
        old = sys.stderr
        self._live.start()
        self.console.show_cursor(True)  # a process that is killed cannot show it again
        for handler in logging.getLogger().handlers:  # they keep the stream that they were made with
            if isinstance(handler, logging.StreamHandler) and handler.stream is old is not sys.stderr:
                self._streams.append((handler, handler.setStream(sys.stderr)))

    def stop(self) -> None:
        """Take the lines away and leave the terminal as it was."""
        if self._live is None:
            return
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []
        self._live.stop()
        self._live = None

    def show(self, rollout: int, completions: Sequence[Shown]) -> None:
        """Print completions above the lines."""
        self.console.print(completions_table(rollout, completions), soft_wrap=False)


def render(state: RunState, width: int) -> RenderableType:
    """What stands there now.

    Args:
        state: of the run.
        width: columns of the terminal.
    """
    width = min(width - 1, _WIDTH)  # a full line would wrap when a column goes
    head, left = Text(f"{printable(state.name)} ", style="bold"), state.left()
    total = f" of {state.total}" if state.total else ""
    is_over = state.total is not None and state.done >= state.total
    now = "saving" if is_over else f"rollout {state.done + 1}{total}"
    head.append(state.doing or now, style="bold cyan")
    if left is not None and not is_over:
        head.append(f"  about {duration(left)} left", style="dim")
    head.truncate(width, overflow="ellipsis")
    lines: list[RenderableType] = [head]
    if state.total:
        lines.append(Text(_bar(min(state.done / state.total, 1.0), min(width, 60)), style="cyan"))
    body = Table.grid(padding=(0, 3, 0, 0))
    if width >= _NARROW:
        body.add_row(_phases(state), _metrics(state))
        lines.append(body)
    else:
        lines += [_running(state), _metrics(state)]
    return Constrain(Group(*lines), width)


def _phases(state: RunState) -> Table:
    """One row per phase: what it took in the last rollout, and how far the running one is."""
    table = Table.grid(padding=(0, 1, 0, 0))
    for width in (None, None, None, 1):  # rich draws an empty column wider than it measures it, and others then wrap
        table.add_column(min_width=width)
    for phase in PHASES:
        running = phase == state.phase
        seconds, speed = state.seconds(phase), state.speed(phase)
        mark = "▸" if running else "✓" if phase in state.over else " "
        took = f"{state.elapsed():.1f} s" if running else "" if seconds is None else f"{seconds:.1f} s"
        table.add_row(
            Text(mark, style="cyan"),
            Text(phase, style="bold cyan" if running else ""),
            Text(took.rjust(8)),
            _progress(state) if running else Text("" if not speed else f"{speed:,.0f} tokens/s", style="dim"),
        )
    return table


def _running(state: RunState) -> Text:
    return Text.assemble((state.phase or "-", "bold cyan"), f"  {state.elapsed():.1f} s  ", _progress(state))


def _progress(state: RunState) -> Text:
    """The running phase: micro-batches or token steps, else a guess from the time it took last."""
    done, total = state.steps
    share = state.share()
    if total:
        return Text(f"{_bar(share)} {done}/{total}", style="cyan")
    bar = _bar(share) if share is not None else ""
    return Text(f"{bar} {f'{done} token steps' if done else ''}".strip(), style="cyan")


def _bar(share: float, width: int = 10) -> str:
    whole = round(share * width)
    return "━" * whole + "─" * (width - whole)


def _metrics(state: RunState) -> Table:
    """The numbers of the last rollout, in pairs of columns, and the trend of the accuracy."""
    shown = [text.format(state.metrics[name]).split(" ", 1) for name, text in SHOWN.items() if name in state.metrics]
    table = Table.grid(padding=(0, 1, 0, 0))
    for i in range(0, len(shown), 2):
        cells = [part for name, value in shown[i : i + 2] for part in (Text(name, style="dim"), Text(value))]
        table.add_row(*cells)
    group = Table.grid()
    group.add_row(table)
    if len(state.correct) > 1:
        group.add_row(Text.assemble(("correct ", "dim"), (sparkline(state.correct), "green")))
    return group


def sparkline(values: Sequence[float]) -> str:
    """Shares as one character each, newest last; of more than 30 values, means of as many pieces.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    if len(values) > _PIECES:
        edges = [round(i * len(values) / _PIECES) for i in range(_PIECES + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    return "".join(_SPARKS[min(max(round(v * (len(_SPARKS) - 1) + 1e-9), 0), len(_SPARKS) - 1)] for v in values)


def completions_table(rollout: int, completions: Sequence[Shown]) -> Table:
    """Prompt, answer, reward with its parts and advantage of some completions; what a model wrote is never markup."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("\n", Text(f"\nrollout {rollout + 1}, completions", style="bold"))
    for one in completions:
        color = {"right": "green", "wrong": "red"}.get(one.verdict, "yellow")
        facts = f"  reward {one.reward:.3g}"
        parts = ", ".join(f"{name} {value:.3g}" for name, value in one.parts.items() if value is not None)
        facts += f" ({printable(parts)})" if parts else ""
        facts += "" if one.advantage is None else f"  advantage {one.advantage:+.2f}"
        table.add_row(Text(one.why, style="bold"), Text.assemble((one.verdict, color), facts))
        table.add_row(Text("prompt", style="dim"), Text(one_line(one.prompt, 240)))
        table.add_row(Text("answer", style="dim"), Text(one_line(one.answer, 480)))
    return table
