"""`kdrl study`."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdrl_pl.cli.errors import Parser
from kdrl_pl.errors import RunError
from kdrl_pl.study.config import read_study
from kdrl_pl.study.plan import Run, plan
from kdrl_pl.study.report import Report
from kdrl_pl.study.runner import environment_of_runs, execute


def main(command: str, arguments: list[str]) -> None:
    """Compare arms: each on every testbed with every seed, from the same models, with the same number of rollouts.

    Every run is a `kdrl fit` of its own. A finished one is never done again, and one that was stopped goes on from its
    last checkpoint: a study that was stopped is simply started again. Other settings are another run. What comes of it:
    ROOT/NAME/results.json, results.md and NAME.svg, over all seeds that were ever run with these settings.

    Raises:
        RunError: a run failed; the others were done.
    """
    options = _options(arguments)
    study = read_study(options.config)
    given = {name: getattr(options, name) for name in ("rollouts", "jobs", "threads")}
    study = dataclasses.replace(study, **{name: value for name, value in given.items() if value is not None})
    runs = plan(study, options.only, options.seeds)
    report = Report(study, plan(study), options.root / study.name, options.write)
    for file in options.add:
        if not file.is_file():
            raise FileNotFoundError(f"no results of a study at {file}")
        report.add_json(file)
    missing = [run for run in runs if not report.results.has(run)]
    environment = environment_of_runs(study.jobs, study.threads)
    if options.dry_run:
        for run in runs:
            words = [*(f"{name}={value}" for name, value in environment.items()), *run.command(report.root)]
            print(shlex.join(words) if run in missing else f"# {run.name} is finished")
        return
    failed: list[str] = []
    if not options.report_only:
        done = len(runs) - len(missing)
        print(f"{len(runs)} runs, {done} of them finished; {study.jobs} at a time, in {report.root}", flush=True)
        failed = _do(missing, report, study.jobs, environment)
    notes = report.write()
    print((report.root / "results.md").read_text())
    for note in notes:
        print(f"note: {note}")
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; start the study again to retry")


def _do(runs: Sequence[Run], report: Report, jobs: int, environment: Mapping[str, str]) -> list[str]:
    """Do `runs` and say what becomes of each; returns the names of those that failed."""
    failed: list[str] = []

    def started(run: Run) -> None:
        print(f"started   {run.name}", flush=True)

    def ended(run: Run, problem: str | None) -> None:
        figures = report.read_folder(run)
        if figures is None:
            failed.append(run.name)
            print(f"FAILED    {run.name}: {problem or 'it ended before its last rollout'}", flush=True)
            return
        report.save()
        shares = "  ".join(f"{name} {value:.1%}" for name, value in figures.items() if name.startswith("pass@"))
        print(f"finished  {run.name}: {shares}  {figures['seconds']:.0f} s", flush=True)

    execute(runs, report.root, jobs=jobs, environment=environment, started=started, ended=ended)
    return failed


def _options(arguments: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    description = "\n".join(line.strip() for line in main.__doc__.partition("Raises:")[0].splitlines())
    parser = Parser(prog="kdrl study", description=description, formatter_class=formatter)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML of the study, see configs/studies/")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="runs to do, TESTBED/ARM or TESTBED/ARM/SEED, with *")
    add("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="instead of those of the study and its arms")
    add("--rollouts", type=_count, metavar="N", help="of every run, instead of those of the study")
    add("--jobs", type=_count, metavar="N", help="runs at the same time (default: the study's)")
    add("--threads", type=_count, metavar="N", help="OMP_NUM_THREADS of each run (default: the study's; 1 if jobs > 1)")
    add("--root", type=Path, default=Path("runs/studies"), help="folder of all studies (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the commands of the runs and do nothing")
    add("--report-only", action="store_true", help="report on what is there")
    add(
        "--write",
        type=Path,
        metavar="PAGE",
        help="fill the blocks <!-- study:NAME table TESTBED --> ... <!-- end --> of a Markdown page (also: differences "
        "TESTBED, plot), with NAME.json and NAME.svg beside it; runs whose figures that JSON has are finished",
    )
    add("--add", type=Path, nargs="+", default=[], metavar="JSON", help="results of other machines to put in")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)
