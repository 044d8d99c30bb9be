"""Results of a study and the files that show them: JSON, Markdown, a plot, and the blocks of a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdrl_pl.files import replacing
from kdrl_pl.study.config import Study
from kdrl_pl.study.page import fill
from kdrl_pl.study.plan import Run
from kdrl_pl.study.plot import NoPlotError, draw
from kdrl_pl.study.results import Results, read_run
from kdrl_pl.study.tables import Entries, arms_table, differences_table


class Report:
    """What is known of a study: earlier JSON, and the run folders of this machine.

    Args:
        study: as configured.
        runs: all of it.
        root: its folder; `results.json`, `results.md` and the plot lie there.
        page: Markdown page whose blocks are filled, JSON and plot beside it; None = none.

    Raises:
        FileNotFoundError: there is no such page.
    """

    def __init__(self, study: Study, runs: Sequence[Run], root: Path, page: Path | None = None) -> None:
        if page is not None and not page.is_file():
            raise FileNotFoundError(
                f"no page {page}; write one with blocks like "
                f"<!-- study:{study.name} table {next(iter(study.testbeds))} --> and <!-- end -->"
            )
        self.study, self.root, self.page = study, root, page
        self.arms = {(run.testbed, run.arm): run for run in runs}
        self.digests = {key: run.digest for key, run in self.arms.items()}
        self.json_files = [root / "results.json", *([page.with_name(f"{study.name}.json")] if page else [])]
        self.results = Results()
        for file in self.json_files:
            self.add_json(file)
        for run in self.arms.values():
            for folder in run.folder(root).parent.glob(f"seed-*-{run.digest}"):
                self.read_folder(dataclasses.replace(run, seed=int(folder.name.split("-")[1])))

    def add_json(self, file: Path) -> None:
        """Put in results that `kdrl study` wrote, here or on another machine."""
        self.results.merge(Results.load(file), self.digests)

    def read_folder(self, run: Run) -> dict[str, Any] | None:
        """Put in the figures of a run and return them; None when it is not finished."""
        figures = read_run(run.folder(self.root), run.rollouts)
        if figures is not None:
            self.results.add(run, figures)
        return figures

    def save(self) -> None:
        """Write the JSON alone, into what other invocations of the study wrote meanwhile."""
        for file in self.json_files:
            there = Results.load(file)
            there.merge(self.results, self.digests)
            there.save(file)

    def write(self) -> list[str]:
        """Write everything; returns what a person should know of it, a line each."""
        notes = self._notes()
        self.save()
        entries = {testbed: self._entries(testbed) for testbed in self.study.testbeds}
        plot = f"{self.study.name}.svg"
        blocks = {}
        for testbed, arms in entries.items():
            blocks[f"table {testbed}"] = arms_table(arms)
            blocks[f"differences {testbed}"] = differences_table(arms, self.study.pairs)
        blocks["plot"] = f"![pass@1 over rollouts and over seconds, per arm]({plot})"
        sections = [
            f"## {testbed}\n\n{blocks[f'table {testbed}']}\n\n{blocks[f'differences {testbed}']}" for testbed in entries
        ]
        _write(self.root / "results.md", "\n\n".join([f"# {self.study.name}", *sections, blocks["plot"]]) + "\n")
        if self.page is not None:
            _write(self.page, fill(self.page.read_text(), self.study.name, blocks))
        drawn = {t: {arm: arms[arm] for arm in self.study.plot if arm in arms} for t, arms in entries.items()}
        drawn = {testbed: arms for testbed, arms in drawn.items() if arms}
        if drawn:
            try:
                for folder in {file.parent for file in self.json_files}:
                    draw(drawn, folder / plot)
            except NoPlotError as error:
                notes.append(str(error))
        return notes

    def _entries(self, testbed: str) -> Entries:
        """arm -> its lists per seed, as far as there are any with the settings of today."""
        runs = [run for (of, _), run in self.arms.items() if of == testbed]
        return {run.arm: entry for run in runs if (entry := self.results.entry(run)) is not None}

    def _notes(self) -> list[str]:
        notes = []
        for testbed, arm, entry in self.results:
            run = self.arms.get((testbed, arm))
            seeds = f"{len(entry['seeds'])} seed{'s' if len(entry['seeds']) > 1 else ''}"
            if run is None:
                notes.append(f"{testbed}/{arm} is no arm of this study; its {seeds} stay in the JSON but not in tables")
            elif entry["digest"] != run.digest:
                notes.append(
                    f"{testbed}/{arm} has {seeds} with other settings; they stay until a run takes their place"
                )
        return notes


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        stream.write(text.encode())
