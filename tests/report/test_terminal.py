"""One row in the terminal: colours, signs where there are none, nothing that moves the cursor."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from run_folders import HOSTILE, stored_row

from kdrl_pl.report.terminal import console, show_row, show_rows, signs
from kdrl_pl.report.tokens import Objective, Token, tokens_of


def shown(row, decode=None, **settings):
    out = io.StringIO()
    settings = {"force_terminal": True, "color_system": "truecolor", "width": 120, "highlight": False, **settings}
    show_row(row, 3, tokens_of(row, Objective(coef=0.5), decode), Console(file=out, markup=False, **settings))
    return out.getvalue()


@pytest.fixture
def digits():
    return lambda ids: "".join(str(token) for token in ids)


def test_colours(digits):
    text = shown(stored_row(7), digits)
    assert "rollout 8, row 3: sums/0, right, reward 1, advantage +0.75, mean |d| 0.833 nats" in text
    # black, underlined for the clash, on #f5a673 (−2 nats); black on #bfdcf7 (+0.5 nats)
    assert "5\x1b[4;30;48;2;245;166;115m6\x1b[0m\x1b[30;48;2;191;220;247m7\x1b[0m" in text


def test_signs_without_colours(digits, monkeypatch):
    text = shown(stored_row(7), digits, color_system=None, force_terminal=False)
    assert "\n56[---!]7[++]\n" in text and "\x1b" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\n56[---!]7[++]\n" in shown(stored_row(7), digits)
    assert "~ not distilled" in text


def test_a_row_that_is_not_distilled_says_so_once(digits):
    text = shown(stored_row(7, kd_weights=[0.0] * 3), digits, color_system=None, force_terminal=False)
    assert "right, reward 1, advantage +0.75, not distilled\n" in text and "\n567\n" in text


def test_a_pipe_gets_whole_lines(digits):
    row, out = stored_row(7, uid="sums/" + "x" * 200), io.StringIO()
    show_row(row, 3, tokens_of(row, Objective(coef=0.5), digits), console(out))
    told = f"rollout 8, row 3: {row['uid']}, right, reward 1, advantage +0.75, mean |d| 0.833 nats"
    assert told in out.getvalue().splitlines()


def test_signs():
    assert signs(Token("a", None, None, True, 1.0, None)) == "[~]"
    assert signs(Token("a", 0.0, 0.05, False, 1.0, 0.0)) == ""
    assert signs(Token("a", 0.0, 9.0, False, -1.0, 9.0)) == "[++++!]"


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_that_mean_harm(text):
    row = stored_row(0, prompt=text, uid=text[:50])
    out = shown(row, lambda ids: text if ids else "", color_system=None, force_terminal=False)
    assert not set(out) & {"\x1b", "\x9b", "\x07", "\x00", "\u202e", "\u2066"}


def test_markup_of_the_terminal_library_is_text():
    assert "[bold red]x[/]" in shown(stored_row(0, prompt="[bold red]x[/]"), color_system=None, force_terminal=False)


def test_the_table_of_rows(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    rows = [stored_row(0, i, teacher_logprobs=[-0.25, -0.5 - i, -1.0], prompt="a\x1b[2Jb\nc") for i in range(14)]
    out = io.StringIO()
    show_rows(rows, console(out))
    lines = out.getvalue().splitlines()
    assert lines[1].split()[:3] == ["13", "4.333", "right"] and lines[1].endswith("a\\x1b[2Jb c")
    assert lines[-1] == "… and 2 rows more; --row shows any of them" and len(lines) == 14
