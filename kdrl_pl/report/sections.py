"""The parts of a page that several pages have: results, tokens, completions, settings, alarms."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrl_pl.report.charts import number
from kdrl_pl.report.completions import Change
from kdrl_pl.report.html import Markup, element, table
from kdrl_pl.report.run import Results
from kdrl_pl.report.tokens import Token, facts

_TEXT = 3000  # characters of a text that are shown
_DOCS = Path(__file__).parents[2] / "docs" / "troubleshooting.md"  # in a checkout

# metric of a validation -> how a table calls it
_RESULTS = {
    "avg_at_k": "correct",
    "maj_at_k": "majority",
    "length": "length",
    "truncated": "cut off",
    "kl_teacher": "KL to teacher",
    "accuracy_per_1k_tokens": "right per 1,000 tokens",
}


def results_rows(results: Results) -> tuple[list[str], dict[str, list[str]]]:
    """Heads, and set -> cells of a table of validation results; pass@k is that of the largest k."""
    largest = [
        max((int(m[8:]) for m in metrics if m.startswith("pass_at_")), default=0) for metrics in results.values()
    ]
    names = dict(_RESULTS)
    if any(largest):
        k = max(largest)
        names = {"avg_at_k": "correct", f"pass_at_{k}": f"pass@{k}", **_RESULTS}
    present = [name for name in names if any(name in metrics for metrics in results.values())]
    cells = {of: [result(name, metrics.get(name)) for name in present] for of, metrics in results.items()}
    return [names[name] for name in present], cells


def result(name: str, value: float | None) -> str:
    """A metric of a validation as text; a dash where there is none."""
    if value is None:
        return "–"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1%}" if name in ("avg_at_k", "maj_at_k", "truncated") or "pass_at" in name else f"{value:,.3g}"


def before_and_after(before: Results | None, after: Results) -> Markup:
    """The table of a run's results, two rows per set."""
    heads, late = results_rows({**after})
    names = {of: {**(before or {}).get(of, {})} for of in after}
    _, early = results_rows({of: {m: names[of][m] for m in names[of] if m in after[of]} for of in after if names[of]})
    rows = []
    for of in after:
        if before is not None:
            cells = early.get(of, [])
            rows.append([f"{of}, before", *(cells if len(cells) == len(heads) else ["–"] * len(heads))])
        rows.append([f"{of}, after" if before is not None else of, *late[of]])
    return table(["set", *heads], rows, "Validation")


def shortened(text: str, limit: int = _TEXT) -> str:
    """Beginning and end of a long text."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n… {len(text) - limit:,} characters …\n{text[-(limit // 2) :]}"


def completion(
    row: Mapping[str, Any], title: str = "", prompt: bool = True, pieces: Sequence[tuple[str, bool]] = ()
) -> Markup:
    """One row: what was asked, what was answered, what it was worth.

    Args:
        row: as stored.
        title: before everything.
        prompt: whether to show it.
        pieces: the response in parts, each with whether it is marked; empty marks nothing.
    """
    text: Any = shortened(row["completion"])
    if pieces and len(row["completion"]) <= _TEXT:
        text = [element("mark", piece) if marked else piece for piece, marked in pieces]
    verdict = element("span", "right", class_="good") if row["correct"] else element("span", "wrong", class_="bad")
    facts = [f"reward {number(row['reward'])}", f"{len(row['response_ids']):,} tokens"]
    if row.get("advantage") is not None:
        facts.append(f"advantage {row['advantage']:+.2f}")
    facts += [f"{name} {number(value)}" for name, value in row.get("parts", {}).items() if value is not None]
    if row["truncated"]:
        facts.append("cut off at the token budget")
    return element(
        "div",
        element("p", [title, ": "] if title else None, verdict, f", {', '.join(facts)}", class_="note"),
        element("pre", shortened(row["prompt"], 1200)) if prompt else None,
        element("pre", text),
    )


def change(pair: Change, counter: str = "rollout") -> Markup:
    """The same problem early and late, side by side."""
    first, last = (
        f"after {when:,} {counter}{'' if when == 1 else 's'}" if when else "before training" for when in pair.when
    )
    return element(
        "div",
        element("p", pair.late["uid"], class_="note"),
        element("pre", shortened(pair.late["prompt"], 1200)),
        element(
            "div", completion(pair.early, first, False), completion(pair.late, last, False, pair.pieces), class_="pair"
        ),
        class_="card",
    )


def tokens_legend() -> Markup:
    """What the colours of tokens mean."""
    keys = [
        ("n4", "the teacher likes the word far less (4 nats or more)"),
        ("n2", "less"),
        ("p2", "more"),
        ("p4", "far more"),
        ("clash", "reward and teacher pull in opposite directions"),
        ("off", "not distilled"),
    ]
    words = [element("li", element("span", "word", class_=f"t {name}"), f" {text}") for name, text in keys]
    return element("ul", words, class_="legend")


def token_view(tokens: Sequence[Token], row: Mapping[str, Any], limit: int = 600) -> Markup:
    """A response with its tokens coloured by `d`, and its strongest disagreements as a table.

    Pointing at a token shows its numbers; the table shows those that matter where there is nothing to point with.

    Args:
        tokens: of the response.
        row: as stored.
        limit: tokens that are shown; the table knows them all.
    """
    spans = []
    for token in tokens[:limit]:
        level = token.level
        names = [f"{'p' if level > 0 else 'n'}{abs(level)}"] if level else []
        names += [name for name, holds in (("off", token.masked), ("clash", token.clash)) if holds]
        spans.append(element("span", _visible(token.text), class_=" ".join(["t", *names]), title=token.words()))
    more = f"… {len(tokens) - limit:,} more tokens" if len(tokens) > limit else None
    known = [(i, token) for i, token in enumerate(tokens) if token.d is not None and abs(token.d) >= 0.1]
    known.sort(key=lambda pair: -abs(pair[1].d))
    rows = [
        [f"{i + 1}: {_visible(t.text)[:40]}", f"{t.d:+.2f}", f"{t.student:.2f}", f"{t.teacher:.2f}",
         _pull(t.reward_pull), _pull(t.teacher_pull)]
        for i, t in known[:8]
    ]  # fmt: skip
    head = ["token", "d", "student", "teacher", "reward pulls", "teacher pulls"]
    return element(
        "div",
        completion_head(row, tokens),
        element("pre", shortened(row["prompt"], 1200)),
        element("div", spans, more, class_="tokens"),
        table(head, rows, "Strongest disagreements, log-probs in nats") if rows else None,
        class_="card",
    )


def completion_head(row: Mapping[str, Any], tokens: Sequence[Token]) -> Markup:
    """What a row is, above its tokens."""
    verdict = element("span", "right", class_="good") if row["correct"] else element("span", "wrong", class_="bad")
    return element("p", f"{row['uid']}: ", verdict, f", {', '.join(facts(row, tokens))}", class_="note")


def alarm_list(alarms: Sequence[Mapping[str, Any]], folder: Path, counter: str) -> list[Markup]:
    """Alarms of a run, the newest of every kind, each with its cure and a link to the page that explains it.

    Args:
        alarms: rows of alarms.jsonl.
        folder: of the page, for the link.
        counter: what `rollout` counts.
    """
    newest: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for alarm in alarms:
        count, _ = newest.pop(str(alarm.get("code")), (0, alarm))
        newest[str(alarm.get("code"))] = (count + 1, alarm)
    shown = []
    for code, (count, alarm) in newest.items():
        times = f", {count} times" if count > 1 else ""
        link: Any = "docs/troubleshooting.md"
        if _DOCS.is_file():
            href = f"{Path(os.path.relpath(_DOCS, folder)).as_posix()}#{_anchor(code)}"
            link = element("a", link, href=href)
        where = f"{counter} {alarm['rollout'] + 1}" if isinstance(alarm.get("rollout"), int) else ""
        shown.append(
            element(
                "div",
                element("h3", f"{code}: {alarm.get('message', '')}"),
                element("p", alarm.get("cure", "")),
                element("p", f"{where}{times}; ", link, class_="note"),
                class_="card alarm",
            )
        )
    return shown


def _anchor(code: str) -> str:
    """What the heading `## K001: hardly any signal` of the page is linked by."""
    headings = [line[3:] for line in _DOCS.read_text().splitlines() if line.startswith("## ")]
    heading = next((heading for heading in headings if heading.startswith(f"{code}:")), code)
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _visible(text: str) -> str:
    """A token that would not be seen on its own."""
    return {"": "·", "\n": "↵\n"}.get(text, text)


def _pull(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"
