"""Nothing that is not markup reaches a page unescaped, and the page's policy matches its style."""

from __future__ import annotations

import base64
import doctest
import hashlib
import importlib
import re

import pytest

from kdrl_pl.report.html import Markup, document, element, table


@pytest.mark.parametrize("name", ["html", "charts", "tokens", "terminal"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"kdrl_pl.report.{name}")).failed == 0


def test_text_is_escaped_and_markup_is_not():
    assert element("p", "<b>", Markup("<i>x</i>")) == "<p>&lt;b&gt;<i>x</i></p>"
    assert element("p", ["a", None, ["<", element("b", "c")]]) == "<p>a&lt;<b>c</b></p>"
    assert element("td", 3) == "<td>3</td>"


def test_attributes_cannot_be_left():
    assert element("a", "x", title="\"'><script>") == '<a title="&quot;&#x27;&gt;&lt;script&gt;">x</a>'
    assert element("svg", viewBox="0 0 1 1", stroke_width=2, class_="c", hidden=True, id=None) == (
        '<svg viewBox="0 0 1 1" stroke-width="2" class="c" hidden></svg>'
    )


def test_control_characters_are_written_out():
    assert element("p", "\x1b[31m\u202eabc\ud800\n") == "<p>\\x1b[31m\\u202eabc\\ud800\n</p>"
    assert element("p", title="\x00") == '<p title="\\x00"></p>'


def test_the_policy_allows_this_style_and_nothing_else():
    page = document("a < b", "p { color: red; }", element("p", "x"))
    digest = base64.b64encode(hashlib.sha256(b"p { color: red; }").digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert "<title>a &lt; b</title>" in page and page.startswith('<!doctype html>\n<html lang="en">')
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<p>x</p>")


def test_tables_have_heads():
    made = table(["set", "correct"], [["sums", "50%"]], "Results")
    assert '<th scope="col">correct</th>' in made and '<th scope="row">sums</th><td>50%</td>' in made
    assert "<caption>Results</caption>" in made
