"""What is shown where: on a real terminal (a pty), in a pipe, in CI; and what a terminal is left with."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from tiny_run import fit, make_data, make_module

from kdrl_pl.progress import Progress, _draws

FIT = [sys.executable, "-m", "kdrl_pl", "fit", "--config", "configs/debug.yaml", "--trainer.val_check_interval", "50"]


def test_settings() -> None:
    with pytest.raises(ValueError, match=r"view\.kind is 'fancy'; expected auto, rich, plain, quiet"):
        Progress(kind="fancy")
    with pytest.raises(ValueError, match=r"view\.completions_every is -1; expected rollouts, or 0 for none"):
        Progress(completions_every=-1)


@pytest.mark.parametrize(
    ("kind", "terminal", "environment", "draws"),
    [
        ("auto", True, {"TERM": "xterm-256color"}, True),
        ("auto", True, {"TERM": "xterm-256color", "NO_COLOR": "1"}, True),  # drawn, without colours
        ("auto", True, {"TERM": "dumb"}, False),
        ("auto", True, {}, False),
        ("auto", True, {"TERM": "xterm", "CI": "true"}, False),
        ("auto", False, {"TERM": "xterm"}, False),
        ("rich", True, {"TERM": "xterm", "CI": "true"}, True),
        ("rich", False, {"TERM": "xterm"}, False),
        ("plain", True, {"TERM": "xterm"}, False),
        ("quiet", True, {"TERM": "xterm"}, False),
    ],
)
def test_where_it_draws(kind, terminal, environment, draws, monkeypatch) -> None:
    class Stdout:
        encoding = "UTF-8"

        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr("sys.stdout", Stdout())
    assert _draws(kind, environment) is draws


def test_a_terminal_that_lacks_the_letters_gets_plain_lines(monkeypatch) -> None:
    class Stdout:
        encoding = "ascii"

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", Stdout())
    assert _draws("auto", {"TERM": "xterm"}) is False


@pytest.mark.parametrize(("kind", "lines"), [("auto", 3), ("plain", 3), ("quiet", 0)])
def test_without_a_terminal_a_rollout_is_one_line(kind, lines, tmp_path, tiny_models, capsys) -> None:
    module = make_module(*tiny_models)
    fit(tmp_path, module, make_data(val=0), max_rollouts=3, before=[Progress(kind)], val_check_interval=50)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    assert all(re.match(r"rollout    \d  reward 0\.\d{3}  correct .* s: rollout \d+%", line) for line in printed)


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str], columns: int = 100, **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(columns)
        self.modes = termios.tcgetattr(theirs)
        environ = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **environment}
        environ.pop("CI", None)
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True
        )
        self.theirs, self.text = theirs, ""

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

    def read(self, until: str | None = None, seconds: float = 120) -> str:
        """What it shows until that appears, or until it ends."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if until is not None and until in self.text:
                return self.text
            if select.select([self.ours], [], [], 0.1)[0]:
                self.text += os.read(self.ours, 65536).decode(errors="replace")
            elif self.process.poll() is not None:
                return self.text
        raise AssertionError(f"{until!r} did not come: {self.text[-2000:]}")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for end in (self.ours, self.theirs):
            os.close(end)


def test_on_a_terminal_it_draws_and_leaves_it_as_it_was(tmp_path) -> None:
    """Ctrl-C in the middle of a run: saved, status 130, cursor visible, modes as before, nothing drawn any more."""
    command = [*FIT, "--run.max_rollouts", "5000", "--run.root", str(tmp_path), "--view.completions_every", "3"]
    terminal = Terminal(command, NO_COLOR="1")
    try:
        terminal.read(until="rollout 6, completions")
        assert "of 5000" in terminal.text and "answer" in terminal.text
        terminal.resize(50)
        os.killpg(terminal.process.pid, signal.SIGINT)  # as the terminal does at Ctrl-C
        text = terminal.read()
        assert terminal.process.wait(30) == 130
        assert termios.tcgetattr(terminal.theirs) == terminal.modes
    finally:
        terminal.close()
    assert re.search(r"stopped by SIGINT: saved \S+", text)
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)  # NO_COLOR
    assert "rollout    1  reward" not in text  # no plain lines


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}])
def test_a_dumb_terminal_gets_plain_lines(environment, tmp_path) -> None:
    terminal = Terminal([*FIT, "--run.root", str(tmp_path)], **environment)
    try:
        text = terminal.read(until="next: ")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
    assert "\x1b" not in text
    assert len(re.findall(r"^rollout +\d+  reward", text, re.MULTILINE)) == 2
