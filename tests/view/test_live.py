"""What is drawn: at every width, without markup from models, and with warnings above it."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from kdrl_pl.view.completions import Shown
from kdrl_pl.view.live import LiveView, completions_table, render, sparkline
from kdrl_pl.view.state import RunState

METRICS = {
    "reward/mean": 0.25,
    "reward/correct": 0.4,
    "rollout/length": 123.4,
    "teacher/reverse_kl": 0.0123,
    "time/rollout": 2.0,
    "perf/rollout_tokens_per_s": 12345.6,
}


def state() -> RunState:
    running = RunState("my-run", 120)
    running.start(0)
    running.finish(44, METRICS)
    running.begin("rollout")
    running.begin("update")
    running.advance(2, 4)
    return running


def drawn(what, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_wide_terminal_shows_every_phase_and_metric() -> None:
    lines = drawn(render(state(), 110), 110)
    assert lines[0].startswith("my-run rollout 45 of 120  about")
    assert "✓ rollout" in lines[2] and "2.0 s" in lines[2] and "12,346 tokens/s" in lines[2]
    assert any("▸ update" in line and "━━━━━───── 2/4" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    assert all(words in text for words in ("reward 0.250", "correct 40.0%", "length 123", "KL 0.012"))
    assert not any("cut" in line for line in lines)  # a metric that the run lacks


@pytest.mark.parametrize("width", [110, 80, 73, 72, 60, 40, 20])
def test_no_line_is_as_wide_as_the_terminal(width) -> None:
    """A full line would wrap, and what is drawn anew would leave pieces behind."""
    running = state()
    running.correct = [0.5] * 400
    running.name = "a-very-long-name-of-a-run-that-nobody-should-choose"
    lines = drawn(render(running, width), width)
    assert max(map(len, lines)) < width
    assert len(lines) <= (8 if width > 72 else 12)


def test_a_run_without_an_end_and_without_metrics() -> None:
    lines = drawn(render(RunState("first"), 100), 100)
    assert lines[0] == "first rollout 1" and "rollout" in lines[1]


def test_before_anything_was_measured_no_cell_wraps() -> None:
    first = RunState("first", 11, lambda: 0.0)
    first.begin("rollout")
    first.begin("reward")
    assert "▸ reward     0.0 s" in drawn(render(first, 100), 100)


def test_after_the_last_rollout_there_is_no_next() -> None:
    over = state()
    over.finish(120, METRICS)
    assert drawn(render(over, 100), 100)[0] == "my-run saving"


def test_validation_is_named() -> None:
    running = state()
    running.doing = "validation after 44 rollouts"
    assert "validation after 44 rollouts" in drawn(render(running, 100), 100)[0]


def test_what_a_model_wrote_is_neither_markup_nor_control() -> None:
    one = Shown("best", "[red]2+2[/red]", "\x1b]0;title\x07[bold]4", 1.0, 0.5, "right", {"[x]": 1.0, "none": None})
    lines = drawn(completions_table(4, [one]), 80)
    text = "\n".join(lines)
    assert "rollout 5, completions" in text and "[red]2+2[/red]" in text and "\\x1b]0;title\\x07[bold]4" in text
    assert "reward 1 ([x] 1)  advantage +0.50" in text and "\x1b" not in text


def test_sparkline() -> None:
    assert sparkline([0, 1 / 7, 2 / 7, 1]) == "▁▂▃█"
    assert sparkline([0.0] * 30 + [1.0] * 30) == "▁" * 15 + "█" * 15
    assert sparkline([-1.0, 2.0]) == "▁█"


def test_warnings_appear_above_and_handlers_get_their_stream_back(monkeypatch) -> None:
    """As on a terminal: stderr is one, and the log handler was made before the display."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    out = Terminal()
    view = LiveView(state(), Console(file=out, width=100, height=30, force_terminal=True, color_system=None))
    try:
        view.start()
        logging.getLogger("kdrl_pl.test").warning("mind the gap")
        view.stop()
        logging.getLogger("kdrl_pl.test").warning("later")
    finally:
        logging.getLogger().removeHandler(handler)
    assert "mind the gap\n" in out.getvalue() and "mind" not in terminal.getvalue()
    assert terminal.getvalue() == "later\n" and handler.stream is terminal
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")  # the cursor is there
    view.stop()  # twice does no harm
