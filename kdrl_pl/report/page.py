"""report.html: what came of a run, on one page that holds everything it shows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrl_pl.files import replacing
from kdrl_pl.report.charts import number
from kdrl_pl.report.completions import best_and_worst, changes, most_disputed, objective_at
from kdrl_pl.report.figures import chart_grid, run_figures
from kdrl_pl.report.html import Markup, breakable, document, element, table
from kdrl_pl.report.run import Run, read_run
from kdrl_pl.report.sections import (
    alarm_list,
    before_and_after,
    change,
    completion,
    result,
    token_view,
    tokens_legend,
)
from kdrl_pl.report.settings import Setting, settings_of
from kdrl_pl.report.style import STYLE
from kdrl_pl.report.tokens import Decode, Token, tokens_of
from kdrl_pl.view.state import duration


def write_report(folder: Path, output: Path | None = None, decode: Decode | None = None) -> Path:
    """Write the report of a run folder as one file, moved into its place when it is whole; returns the file.

    Args:
        folder: of a run, which may still go on.
        output: file to write; None takes `report.html` in the folder.
        decode: see `tokens.tokens_of`.

    Raises:
        FileNotFoundError: this is no run folder.
        ValueError: one of its files is damaged.
    """
    run = read_run(folder)
    output = run.folder / "report.html" if output is None else Path(output)
    write_page(output, report(run, output.parent.absolute(), decode))
    return output


def write_page(output: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


def report(run: Run, folder: Path, decode: Decode | None = None) -> str:
    """The page of a run.

    Args:
        run: from `read_run`.
        folder: where the page will stand, for its links.
        decode: see `tokens.tokens_of`.
    """
    sections = {
        "Results": [before_and_after(run.before, run.after)] if run.after else [],
        "Alarms": alarm_list(run.alarms, folder, run.counter),
        "Curves": [chart_grid(charts)] if (charts := run_figures(run)) else [],
        "Completions": _completions(run),
        "Tokens": _disagreement(run, decode),
        "Settings": _settings(run),
        "Metrics": [_metrics(run)] if run.training else [],
        "Environment": [_environment(run.environment)] if run.environment is not None else [],
        "Again": _again(run),
    }
    shown = {title: content for title, content in sections.items() if content}
    links = [element("li", element("a", title, href=f"#{title.lower()}")) for title in shown]
    return document(
        f"{run.name}: report",
        STYLE,
        element("h1", run.name),
        element("p", _status(run)),
        _headline(run),
        element("nav", element("ul", links, class_="legend"), aria_label="Sections"),
        *(element("section", element("h2", title), *content, id=title.lower()) for title, content in shown.items()),
    )


def inspect_page(run: Run, row: dict[str, Any], number: int, tokens: Sequence[Token]) -> str:
    """The page of one row.

    Args:
        run: it comes from.
        row: as stored.
        number: of the row in its rollout.
        tokens: of its response.
    """
    title = f"{run.name}: rollout {row['rollout'] + 1}, row {number}"
    estimator = objective_at(run, row["rollout"]).estimator
    return document(
        title,
        STYLE,
        element("h1", title),
        element("p", _told(estimator)),
        tokens_legend(),
        token_view(tokens, row, 20_000),
    )


def _status(run: Run) -> str:
    counter, of = run.counter, (run.config.get("run") or {}).get("max_rollouts")
    if run.summary is not None:
        return (
            f"Finished after {run.summary['rollouts']:,} rollouts, {duration(run.summary['seconds'])}, "
            f"{run.summary['tokens']:,} sampled tokens."
        )
    if not run.done:
        return f"No {counter} is finished yet."
    end = f" of {of:,}" if of and counter == "rollout" else ""
    return f"Under way, or stopped: {run.done:,}{end} {counter}s are in metrics.jsonl."


def _headline(run: Run) -> Markup | None:
    tiles = []
    for of, metrics in run.after.items():
        before = (run.before or {}).get(of, {}).get("avg_at_k")
        if "avg_at_k" in metrics:
            late = result("avg_at_k", metrics["avg_at_k"])
            early = "" if before is None else f"{result('avg_at_k', before)} → "
            told = "correct before → after" if early else "correct"
            tiles.append(element("li", element("span", early, late, class_="big"), f"{of}: {told}"))
    return element("ul", tiles, class_="tiles") if tiles else None


def _completions(run: Run) -> list[Any]:
    stored = run.stored()
    rows = run.rows(stored[-1]) if stored else []
    best, worst = best_and_worst(rows)
    changed = changes(run)
    shown: list[Any] = []
    if changed:
        shown += [
            element("h3", "Most changed"),
            element("p", "The same problems early and late, sampled with the same random numbers.", class_="note"),
            [change(pair, run.counter) for pair in changed],
        ]
    for title, group in (("Best", best), ("Worst", worst)):
        if group:
            cards = [element("div", completion(row, row["uid"]), class_="card") for row in group]
            shown += [element("h3", f"{title} of rollout {stored[-1] + 1}"), element("div", cards, class_="pair")]
    return shown


def _disagreement(run: Run, decode: Decode | None) -> list[Any]:
    """Where student and teacher disagree: rows of the newest stored rollout, and of the oldest when it is another."""
    stored = run.stored()
    shown: list[Any] = []
    for rollout, count in ((stored[-1], 4), (stored[0], 2)) if len(stored) > 1 else ((n, 4) for n in stored):
        rows = run.rows(rollout)
        views = [
            token_view(tokens_of(rows[i], objective_at(run, rollout), decode), rows[i])
            for i in most_disputed(rows, count)
        ]
        if views:
            shown += [element("h3", f"Rollout {rollout + 1}"), *views]
    if not shown:
        return []
    told = _told(objective_at(run, stored[-1]).estimator)
    ids = (
        None if decode else element("p", "The student's tokenizer was not found, so tokens are numbers.", class_="note")
    )
    return [element("p", told), tokens_legend(), ids, *shown]


def _told(estimator: str) -> str:
    """What the colours of tokens say."""
    told = (
        "Where student and teacher disagree: words of the student coloured by d = log-prob of the teacher − log-prob "
        "of the student. The reward pulls by the advantage, the teacher by β·f(d)."
    )
    if estimator in ("full", "top_k"):
        told += " It pulls at every word of the vocabulary; what is shown is the word that was sampled."
    return told


def _settings(run: Run) -> list[Any]:
    settings = settings_of(run.config)
    changed, usual = ([s for s in settings if s.changed is which] for which in (True, False))
    head = ["setting", "value", "default"]
    return [
        table(head, map(_setting, changed), "Settings that are not the default", numbers=False),
        element(
            "details",
            element("summary", f"{len(usual)} settings left at their default"),
            table(head[:2], (_setting(s)[:2] for s in usual), "Settings at their default", numbers=False),
        )
        if usual
        else None,
    ]


def _setting(setting: Setting) -> list[str]:
    default = "" if setting.default is None else breakable(plain(setting.default))
    return [breakable(setting.name), breakable(plain(setting.value)), default]


def plain(value: Any) -> str:
    """A setting as one would write it."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def _metrics(run: Run) -> Markup:
    names = sorted({name for row in run.training for name in row if "/" in name})
    rows = []
    for name in names:
        values = [row[name] for row in run.training if row.get(name) is not None]
        if values:
            rows.append([breakable(name), *map(number, (values[0], values[-1], min(values), max(values)))])
    content = table(["metric", "first", "last", "lowest", "highest"], rows, "Metrics of the training")
    return element("details", element("summary", f"{len(rows)} metrics (docs/metrics.md says what they are)"), content)


def _environment(env: Mapping[str, Any]) -> Markup:
    cpu, git = env.get("cpu") or {}, env.get("git")
    devices = ", ".join(str(device.get("name")) for device in env.get("devices") or []) or "none"
    packages = {name: version for name, version in (env.get("packages") or {}).items() if version is not None}
    rows = [
        ["Python", env.get("python", "")],
        ["machine", env.get("platform", "")],
        ["CPU", f"{cpu.get('name')}, {cpu.get('count')} cores, {cpu.get('torch_threads')} threads of torch"],
        ["accelerators", devices],
        ["commit", f"{git['commit']}{', with changes' if git.get('changed') else ''}" if git else "not in git"],
        *packages.items(),
    ]
    return table(["what", "version"], rows, "What the run stood on", numbers=False)


def _again(run: Run) -> list[Any]:
    config = shlex.quote(str(run.folder / "config.yaml"))
    command = "fit" if run.counter == "rollout" else "sft"
    lines = [f"kdrl {command} --config {config}"]
    if command == "fit":
        lines.append(f"kdrl fit --resume {shlex.quote(str(run.folder))} --run.max_rollouts {max(run.done * 2, 1)}")
    lines.append(f"kdrl export {shlex.quote(str(run.folder))}")
    told = (
        "The same run, the run continued, and its student as a Hugging Face folder:"
        if command == "fit"
        else ("The same run, and its student as a Hugging Face folder:")
    )
    return [
        element("p", told),
        element("pre", "\n".join(lines)),
        element("p", "Secrets and packages named by --allow-import are given again.", class_="note"),
    ]
