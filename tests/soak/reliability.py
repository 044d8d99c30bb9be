"""Puts the promises of docs/reliability.md to the test, and writes what came out.

    python tests/soak/reliability.py [--rollouts 300] [--faults 24] [--kills 50] [--only 1 2 ...] [--workers 2]

Runs the tests that hold each promise, the slow ones too, then the soak; writes docs/reliability.json and the table of
docs/reliability.md. Its exit status is 1 if any promise does not hold. Three quarters of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reliability.md"

# promise -> what holds it: files or tests, as pytest names them
PROMISES: dict[str, tuple[str, ...]] = {
    "1 exact resume": (
        "tests/test_resume.py",
        "tests/test_fsdp2.py",
        "tests/test_invariance.py::test_two_processes_resume_bit_for_bit",
        "tests/faults/test_preemption.py::test_commands_that_gave_way_resume_bit_equal",
    ),
    "2 checkpoints are whole or absent": (
        "tests/test_checkpoint.py",
        "tests/test_shards.py",
        "tests/faults/test_sharded_kills.py",
        "tests/faults/test_disk.py",
    ),
    "3 resume finds the newest whole one, or refuses": (
        "tests/test_resume.py::test_resume_auto_takes_the_newest_run_that_has_a_checkpoint",
        "tests/test_resume.py::test_a_checkpoint_of_another_teacher_is_refused",
        "tests/test_resume.py::test_a_checkpoint_of_another_data_set_is_refused_unless_one_insists",
        "tests/test_resume.py::test_a_checkpoint_of_another_tokenizer_is_refused_unless_one_insists",
        "tests/test_resume.py::test_a_killed_command_resumes",
        "tests/test_checkpoint.py::test_damaged_checkpoints_are_passed_over_and_named",
        "tests/test_checkpoint.py::test_the_newest_is_found_by_rollouts_and_best_by_name",
    ),
    "4 preemption": ("tests/faults/test_preemption.py",),
    "5 non-finite steps": ("tests/faults/test_nonfinite.py",),
    "6 degenerate batches": ("tests/faults/test_degenerate.py",),
    "7 rewards": ("tests/rewards",),
    "8 one rank's failure ends the job": ("tests/faults/test_rank_failure.py",),
    "9 the teacher never changes": (
        "tests/test_module.py::test_the_teacher_is_neither_saved_nor_changed",
        "tests/teacher/test_kinds.py",
        "tests/test_fsdp2.py::test_checkpoints_hold_the_student_and_nothing_of_the_teacher",
    ),
    "10 sampler and trainer agree": (
        "tests/test_sampler_check.py",
        "tests/test_module.py::test_a_sampler_that_is_another_policy_stops_the_run",
        "tests/test_module.py::test_a_first_rollout_without_signal_does_not_use_up_the_check",
        "tests/test_module.py::test_sampler_and_trainer_agree_at_every_temperature",
    ),
    "11 security": (
        "tests/cli/test_imports.py",
        "tests/cli/test_secrets.py",
        "tests/test_text.py",
        "tests/teacher/test_server.py",
    ),
    "12 bad input": ("tests/cli/test_errors.py",),
    "properties": ("tests/properties",),
}


def hold(tests: tuple[str, ...], kills: int, workers: int) -> dict[str, Any]:
    """Run tests; how many passed and failed, and the figures that they recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-q", "-n", str(workers), "-m", "not gpu and not vllm and not browser", f"--junitxml={report}", *tests]
        started = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=ROOT,
            env={**os.environ, "KDRL_KILLS": str(kills)},
            check=False,
        )
        if ran.returncode not in (0, 1):  # 1: a test failed; else nothing was held to anything
            raise SystemExit(f"pytest ended with status {ran.returncode}: is a test gone that a promise names?")
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    recorded: dict[str, int] = {}
    for figure in (figure for case in cases for figure in case.iter("property")):
        recorded[figure.get("name")] = recorded.get(figure.get("name"), 0) + int(figure.get("value"))
    passed = len(cases) - len(bad) - skipped
    found = {"passed": passed, "failed": bad, "skipped": skipped, "seconds": round(time.monotonic() - started)}
    return {**found, **recorded}


def table(report: Mapping[str, Any]) -> str:
    """The block of the page."""
    lines = ["| promise | tests passed | failed | counted | seconds |", "| --- | ---: | ---: | --- | ---: |"]
    for promise, found in report["promises"].items():
        counted = {k: v for k, v in found.items() if k not in ("passed", "failed", "skipped", "seconds")}
        text = ", ".join(f"{name}: {value}" for name, value in counted.items())
        lines.append(f"| {promise} | {found['passed']} | {len(found['failed'])} | {text} | {found['seconds']} |")
    soak, halves = report.get("soak"), []
    if soak:
        for half in ("process faults", "process and reward faults"):
            counts = ", ".join(f"{name}: {value}" for name, value in soak[half].items() if name != "equal")
            halves.append(f"- **{half}**, {soak['rollouts']} rollouts; {counts}: equal to the clean run, bit for bit.")
        early, late = soak["memory"].values()
        halves.append(f"- **memory** of the clean run: {early} MB in its second sixth, {late} MB in its last.")
        halves.append(f"- {soak['seconds']} seconds.")
    return "\n".join([*lines, "", *halves, "", f"Made on {report['machine']}."])


def main() -> int:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=300)
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="numbers of promises, or soak")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from kdrl_pl.environment import environment

    cpu = environment()["cpu"]
    file = PAGE.with_suffix(".json")
    report = json.loads(file.read_text()) if options.only and file.exists() else {"promises": {}}
    report["machine"] = f"{cpu['name']}, {cpu['count']} cores"
    for promise, tests in PROMISES.items():
        if not options.only or promise.split()[0] in options.only:
            print(f"== {promise}", flush=True)
            report["promises"][promise] = hold(tests, options.kills, options.workers)
    status = 0
    if not options.only or "soak" in options.only:
        print("== soak", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "soak.json"
            numbers = ["--rollouts", str(options.rollouts), "--faults", str(options.faults), "--json", str(figures)]
            status = subprocess.run([sys.executable, "tests/soak/soak.py", *numbers], cwd=ROOT, check=False).returncode
            report["soak"] = json.loads(figures.read_text()) if status == 0 else None
    report["promises"] = {promise: report["promises"][promise] for promise in PROMISES if promise in report["promises"]}
    file.write_text(json.dumps(report, indent=1) + "\n")
    block = re.compile(r"(<!-- reliability -->\n).*?(<!-- end -->)", re.DOTALL)
    page = block.sub(lambda match: f"{match[1]}\n{table(report)}\n\n{match[2]}", PAGE.read_text())
    PAGE.write_text(page)
    failed = {promise: found["failed"] for promise, found in report["promises"].items() if found["failed"]}
    print(json.dumps(failed, indent=1) if failed else "every promise holds" if status == 0 else "the soak failed")
    return 1 if failed or status else 0


if __name__ == "__main__":
    sys.exit(main())
