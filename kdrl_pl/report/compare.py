"""Several runs laid over each other: results, curves, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_pl.report.figures import chart_grid, compared_figures
from kdrl_pl.report.html import breakable, document, element, table
from kdrl_pl.report.page import plain
from kdrl_pl.report.run import Run
from kdrl_pl.report.sections import result
from kdrl_pl.report.settings import flat
from kdrl_pl.report.style import STYLE
from kdrl_pl.text import printable

_ALWAYS_OTHERS = ("run.root",)  # differs without a meaning
_COLUMNS = ("avg_at_k", "length", "truncated", "kl_teacher")
_HEADS = ("correct before", "after", "length", "cut off", "KL to teacher")


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name for every run that is no other's: the end of its path, as long as it must be."""
    for length in range(1, max(len(run.folder.parts) for run in runs) + 1):
        names = [run.folder.parts[-2] if length == 1 else "/".join(run.folder.parts[-length:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return names


def comparable(runs: Sequence[Run]) -> Sequence[Run]:
    """The runs, once it is sure that they can stand in one table.

    Raises:
        ValueError: there are fewer than two, one twice, or trainings of kdrl fit and kdrl sft together.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run folder is given; expected at least two (kdrl report shows one)")
    folders = [run.folder for run in runs]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"{twice} is given twice; name every run once")
    if len({run.counter for run in runs}) > 1:
        raise ValueError("runs of kdrl fit and of kdrl sft have no metric in common; compare like with like")
    return runs


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Settings that are not the same in all runs: name -> value per run, None where a run has none."""
    settings = [flat(run.config) for run in runs]
    names = dict.fromkeys(name for values in settings for name in values if name not in _ALWAYS_OTHERS)
    rows = [(name, [values.get(name) for values in settings]) for name in names]
    differing = {name: values for name, values in rows if any(value != values[0] for value in values[1:])}

    def says_no_more(name: str) -> bool:
        """Whether some runs lack the whole object, and the others have it alike."""
        present = [value for value in differing[name] if value is not None]
        above = (name[:i] for i, letter in enumerate(name) if letter == ".")
        return any(parent in differing for parent in above) and all(value == present[0] for value in present)

    return [(name, values) for name, values in differing.items() if not says_no_more(name)]


def results(runs: Sequence[Run]) -> dict[str, list[list[str]]]:
    """Set -> one row per run: correct before and after, length, truncated, KL to the teacher, seconds, rollouts."""
    sets = dict.fromkeys(name for run in runs for name in run.after)
    return {of: [_row(run, of) for run in runs] for of in sets}


def _row(run: Run, of: str) -> list[str]:
    before, after = (run.before or {}).get(of, {}), run.after.get(of, {})
    cells = [result("avg_at_k", before.get("avg_at_k")), *(result(name, after.get(name)) for name in _COLUMNS)]
    seconds = sum(row.get("time/step") or 0.0 for row in run.training)
    return [*cells, f"{run.done:,}", f"{seconds:,.0f}" if seconds else "–"]


def compare_text(runs: Sequence[Run]) -> str:
    """The results and the settings that differ, as plain text."""
    names, blocks = labels(runs), []
    heads = [*_HEADS, f"{runs[0].counter}s", "seconds"]
    for of, rows in results(runs).items():
        blocks.append(_text_table([[of, *heads], *([name, *row] for name, row in zip(names, rows, strict=True))]))
    differing = [[name, *map(plain, values)] for name, values in differences(runs)]
    blocks.append(_text_table([["setting", *names], *differing]) if differing else "All settings are the same.")
    return printable("\n\n".join(blocks))


def _text_table(rows: Sequence[Sequence[str]]) -> str:
    rows = [[cell if len(cell) <= 40 else f"{cell[:37]}..." for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def compare_page(runs: Sequence[Run]) -> str:
    """The page of several runs, from `read_run` and `comparable`."""
    names = labels(runs)
    labelled = list(zip(names, runs, strict=True))
    heads = ["run", *_HEADS, f"{runs[0].counter}s", "seconds of training"]
    tables = [
        table(heads, ([name, *row] for name, row in zip(names, rows, strict=True)), of)
        for of, rows in results(runs).items()
    ]
    differing: Sequence[tuple[str, list[Any]]] = differences(runs)
    settings = [[breakable(name), *(breakable(plain(value)) for value in values)] for name, values in differing]
    folders: Mapping[str, Run] = dict(labelled)
    return document(
        f"{len(runs)} runs compared",
        STYLE,
        element("h1", f"{len(runs)} runs compared"),
        element("ul", [element("li", f"{name}: {run.folder}") for name, run in folders.items()], class_="note"),
        element("section", element("h2", "Results"), *tables) if tables else None,
        element("section", element("h2", "Curves"), chart_grid(compared_figures(labelled))),
        element(
            "section",
            element("h2", "Settings that differ"),
            table(["setting", *names], settings, "Settings", numbers=False)
            if settings
            else element("p", "None: the runs have the same settings."),
        ),
    )
