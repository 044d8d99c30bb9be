"""`kdrl doctor`: is everything ready for a run? One line per thing looked at, with the cure where one is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from kdrl_pl.cli.errors import Parser
from kdrl_pl.cli.run import USER_ERRORS, quieten_lightning
from kdrl_pl.doctor.findings import Finding, fail
from kdrl_pl.doctor.machine import machine
from kdrl_pl.text import printable

_COLORS = {"ok": "32", "warn": "33", "fail": "31"}


def main(command: str, arguments: list[str]) -> int:
    """Look at machine, data, reward and models of a run; exit status 1 when something is wrong.

    With --config, or any other setting of kdrl fit, it is that run that is looked at, from its tokenizer to one tiny
    rollout; without, the machine alone. Nothing is written.
    """
    parser = Parser(prog="kdrl doctor", usage="%(prog)s [options] [--config FILE ...] [--SECTION.KEY VALUE ...]")
    parser.description = main.__doc__
    parser.add_argument("--prompts", type=int, default=16, help="prompts that student and teacher answer (default: 16)")
    parser.add_argument("--tokens", type=int, default=512, help="of a response at most (default: 512)")
    parser.add_argument("--no-models", action="store_true", help="load no weights: no rollout, no teacher")
    options, of_run = parser.parse_known_args(arguments)
    for name in ("prompts", "tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; expected at least 1")
    if not of_run:
        return say(machine())
    from kdrl_pl.cli.imports import allow_imports
    from kdrl_pl.cli.kdrl import KDRLCLI
    from kdrl_pl.data.datamodule import PromptDataModule
    from kdrl_pl.module import KDRLModule

    quieten_lightning()
    sys.path.insert(0, "")
    status = [0]

    def look(cli: Any) -> None:
        status[0] = say(run_findings(cli, options))

    KDRLCLI(KDRLModule, PromptDataModule, command="fit", arguments=allow_imports(of_run), instead=look)
    return status[0]


def run_findings(cli: Any, options: Any) -> Iterator[Finding]:
    """The findings about one run; an error of its own kind becomes the last of them."""
    from kdrl_pl.cli.dry_run import attach, find
    from kdrl_pl.doctor.models import models
    from kdrl_pl.doctor.texts import reward, room, teacher_paths, tokenizer_and_template

    yield from machine(cli.folder.parent)
    module, data, rollouts = cli.model, attach(cli), find(cli, "group_size")
    try:
        data.setup("fit")
        budget = rollouts.sampling.max_tokens
        teachers = teacher_paths(module.teacher) if module.needs_teacher else []
        yield from tokenizer_and_template(data, module.student_path, teachers)
        yield from room(data, module.student_path, budget)
        rollouts.reward.setup()
        train = [prompt for prompts in data.rows["train"].values() for prompt in prompts]
        yield from reward(rollouts.reward, train, budget)
        if not options.no_models:
            val = [prompt for prompts in data.rows.get("val", {}).values() for prompt in prompts]
            some = (val or train)[: options.prompts]
            yield from models(module, data, rollouts, cli.trainer, some, options.tokens)
    except USER_ERRORS as error:
        yield fail("run", str(error), "mend this first; what comes after it was not looked at")
    finally:
        rollouts.reward.close()


def say(findings: Iterable[Finding]) -> int:
    """Print findings as they come; 1 when one of them is a failure."""
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    counts = dict.fromkeys(_COLORS, 0)
    for finding in findings:
        counts[finding.state] += 1
        word = f"{finding.state:<4}"
        word = f"\x1b[{_COLORS[finding.state]}m{word}\x1b[0m" if colored else word
        text = "\n".join(part for part in (finding.text, finding.cure) if part)
        print(f"{word}  {finding.what:<10}  {printable(text).replace(chr(10), chr(10) + ' ' * 18)}", flush=True)
    print(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} wrong")
    return int(counts["fail"] > 0)
