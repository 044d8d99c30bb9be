"""The `kdrl` command. This front imports nothing heavy, so that `--help` and `--version` answer at once."""

from __future__ import annotations

import sys

COMMANDS = {
    "fit": "train a student by KDRL (or any arm of it)",
    "validate": "evaluate student, teacher or a checkpoint on the validation sets",
    "test": "the same on the test sets",
    "predict": "write prompts, completions, rewards and log-probs as JSONL",
    "sft": "supervised fine-tuning: the off-policy baseline, and how the tiny models are made",
    "replay": "push stored rollouts through every estimator, mask and coefficient",
    "recipes": "the runs that come with the library: list, show, copy",
    "doctor": "look at machine, data, reward and models before a run",
    "estimate": "memory, tokens and operations of a run before it runs, on any number of ranks",
    "report": "one page of what came of a run: curves, completions, settings",
    "compare": "several runs over each other: a table, a page of curves",
    "inspect": "a stored rollout token by token: teacher against student",
    "export": "turn a run's checkpoint into a Hugging Face folder",
    "serve-teacher": "a frozen teacher over HTTP, for runs on other processes or machines",
    "study": "compare arms over seeds and testbeds: runs, tables, learning curves",
}

HELP = """usage: kdrl COMMAND [--config FILE ...] [--SECTION.KEY VALUE ...]

Post-train reasoning language models by KDRL: GRPO and on-policy distillation in one objective.

commands:
{commands}

examples:
  kdrl fit --config configs/quickstart.yaml
  kdrl fit --config configs/kdrl.yaml --config configs/arms/grpo.yaml --model.student PATH
  kdrl fit --resume runs/quickstart/2026-01-31_12-00-00
  kdrl export runs/quickstart/2026-01-31_12-00-00
  kdrl study --config configs/studies/smoke.yaml

`kdrl COMMAND --help` lists its options, `--help-all` every setting; `kdrl fit ... --dry-run` says what would run.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(HELP.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())), end="")
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"kdrl_pl {version('kdrl_pl')}")
        return 0
    if command.startswith("-") and (moved := _command_first(arguments)) is not None:
        arguments, command = moved, moved[0]
    if command not in COMMANDS:
        if command.startswith("-"):
            named = next((argument for argument in arguments if argument in COMMANDS), "fit")
            others = [argument for argument in arguments if argument != named]
            said = f"{command!r} is not a command, which comes first: kdrl {named} {' '.join(others)}"
            print(f"kdrl: {said} (kdrl --help lists them)", file=sys.stderr)
            return 2
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"kdrl: {command!r} is not a command{hint} (kdrl --help lists them)", file=sys.stderr)
        return 2
    if "--help" in arguments or "-h" in arguments:
        from kdrl_pl.cli.help import short_help

        if (text := short_help(command)) is not None:
            print(text, end="")
            return 0
    from kdrl_pl.cli.run import run

    return run(command, ["--help" if argument == "--help-all" else argument for argument in arguments[1:]])


def _command_first(arguments: list[str]) -> list[str] | None:
    """`--config FILE ... COMMAND ...` with the command in front; None where anything else precedes it."""
    place = 0
    while place < len(arguments) and arguments[place].partition("=")[0] in ("--config", "-c"):
        place += 1 if "=" in arguments[place] else 2
    if place >= len(arguments) or arguments[place] not in COMMANDS:
        return None
    return [arguments[place], *arguments[:place], *arguments[place + 1 :]]


if __name__ == "__main__":
    sys.exit(main())
