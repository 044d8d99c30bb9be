"""The pages in a real browser: they show what they should, fit, follow the system's colours; nothing in them acts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from run_folders import HOSTILE, config, write_long_run, write_run

from kdrl_pl.report.compare import compare_page
from kdrl_pl.report.page import inspect_page, report, write_page
from kdrl_pl.report.run import read_run
from kdrl_pl.report.tokens import Objective, tokens_of

_spec = importlib.util.spec_from_file_location("chromium", Path(__file__).with_name("chromium.py"))
chromium = sys.modules.setdefault("chromium", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(chromium)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.EXECUTABLE is None, reason="needs Chromium"),
]
FITS = "document.documentElement.scrollWidth <= innerWidth"


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium() as browser:
        yield browser


def page_of(folder, **more):
    write_run(folder, **more)
    write_page(folder / "report.html", report(read_run(folder), folder))
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("runs") / "made" / "2026-01-31_12-00-00")


def test_it_renders_without_complaint(browser, page):
    browser.open(page)
    assert browser.messages == []
    assert browser.ask("document.querySelectorAll('svg').length") == 14
    assert browser.ask("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 100)")
    # the line of correct responses: four rollouts, drawn in the first colour
    lines = browser.ask(
        "[...document.querySelectorAll('.line.s0')].map(l => [l.getTotalLength(), getComputedStyle(l).stroke])"
    )
    assert len(lines) == 13 and all(length > 100 and colour == "rgb(0, 96, 168)" for length, colour in lines)
    assert browser.ask("document.querySelector('.big').innerText") == "25.0% → 50.0%"


def test_every_chart_and_table_has_a_name(browser, page):
    browser.open(page)
    assert browser.ask("[...document.querySelectorAll('svg')].every(s => s.querySelector('title').textContent)")
    assert browser.ask(
        "[...document.querySelectorAll('table')].every(t => t.caption && t.tHead.querySelector('th[scope]'))"
    )
    assert browser.ask("document.documentElement.lang") == "en"


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("text", ["0579", "x" * 20_000])
def test_nothing_scrolls_sideways(browser, tmp_path, width, text):
    long_names = config(student="/" + "very-long-folder/" * 30)
    browser.open(page_of(tmp_path / "run", texts=[text], settings=long_names), width)
    assert browser.ask(FITS), browser.ask("document.documentElement.scrollWidth")


def test_dark_is_dark_and_light_is_light(browser, page):
    def brightness(selector, style):
        colour = browser.ask(f"getComputedStyle(document.querySelector('{selector}')).{style}")
        return sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(",")))

    browser.open(page, dark=True)
    assert brightness("body", "backgroundColor") < 100 < 600 < brightness("body", "color")
    browser.open(page, dark=False)
    assert brightness("body", "color") < 100 < 600 < brightness("body", "backgroundColor")


# Contrast of every text against the nearest background behind it, after WCAG 2.
CONTRAST = """
(() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = rgb(c).map(linear); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => {
    for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (rgb(c)[3] !== 0) return c; }
  };
  const worst = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    const shown = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!shown || e.closest('rect, title, desc')) continue;
    const style = getComputedStyle(e), colour = e.closest('svg') ? style.fill : style.color;
    const [low, high] = [light(colour), light(behind(e))].sort((a, b) => a - b);
    const ratio = (high + .05) / (low + .05);
    if (ratio < worst[0]) { worst[0] = ratio; worst[1] = e.getAttribute('class') + ' ' + e.textContent.slice(0, 40); }
  }
  return worst;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read(browser, page, dark):
    browser.open(page, dark=dark)
    ratio, where = browser.ask(CONTRAST)
    assert ratio >= 4.5, where


def test_colours_of_tokens_follow_the_disagreement(browser, page):
    browser.open(page)
    colours = browser.ask(
        "[...document.querySelector('.tokens').querySelectorAll('.t')].map(t => getComputedStyle(t).backgroundColor)"
    )
    assert colours == ["rgba(0, 0, 0, 0)", "rgb(245, 166, 115)", "rgb(191, 220, 247)"]  # d = 0, −2, +0.5


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_wrote_is_inert(browser, tmp_path, text):
    folder = write_run(tmp_path / "run", texts=[text, text], settings={**config(), "evil": text[:300]})
    run = read_run(folder)
    row = run.rows(3)[0]
    tokens = tokens_of(row, Objective(coef=0.5), lambda ids: text * len(ids))
    for made in (
        report(run, folder, lambda ids: text * len(ids)),
        inspect_page(run, row, 0, tokens),
        compare_page([run, run]),
    ):
        write_page(folder / "page.html", made)
        browser.open(folder / "page.html", 390)
        assert browser.messages == []
        assert browser.ask("typeof pwned") == "undefined"
        assert browser.ask("document.querySelectorAll('script, img, iframe, [onload], [onerror]').length") == 0
        assert browser.ask("[...document.links].every(a => a.protocol === 'file:')")
        assert browser.ask("document.querySelectorAll('style').length") == 1
        assert browser.ask(FITS)


@pytest.mark.parametrize(
    "injected",
    [
        "<script>window.pwned=1</script>",
        "<img src=x onerror='window.pwned=1'>",
        "<svg onload='window.pwned=1'></svg>",
        "<style>body { display: none }</style>",
        "<link rel=stylesheet href='data:text/css,body{display:none}'>",
        "<p style='position: fixed'>x</p>",
        "<iframe src='data:text/html,x'></iframe>",
        "<base href='https://example.com/'>",
    ],
)
def test_the_browser_refuses_what_slips_in(browser, page, injected):
    """As if escaping had failed: the Content-Security-Policy is the second wall."""
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("<main>", f"<main>{injected}", 1))
    browser.open(broken)
    assert browser.ask("typeof pwned") == "undefined"
    assert any("Content Security Policy" in message for message in browser.messages), browser.messages
    assert browser.ask("getComputedStyle(document.body).display") == "block"


def test_a_thousand_rollouts(browser, tmp_path):
    folder = write_long_run(tmp_path / "run")
    page = folder / "report.html"
    write_page(page, report(read_run(folder), folder))
    assert page.stat().st_size < 3e6
    seconds = browser.open(page, 390)
    print(f"{page.stat().st_size / 1e6:.2f} MB, loaded in {seconds:.2f} s")
    assert browser.messages == [] and browser.ask("document.querySelectorAll('.band').length") > 20


def test_runs_compared(browser, tmp_path):
    runs = [read_run(write_run(tmp_path / name / "1", rollouts=n)) for name, n in (("kdrl", 4), ("grpo", 6))]
    write_page(tmp_path / "compare.html", compare_page(runs))
    browser.open(tmp_path / "compare.html", 390)
    assert browser.messages == [] and browser.ask(FITS)
    assert browser.ask("document.querySelectorAll('.line.s1').length") > 10
