"""Draws what a terminal shows near the end of a finished run, from the run's own files, into docs/images/terminal.svg.

kdrl fit --config configs/quickstart.yaml
python docs/images/terminal.py runs/quickstart/<time>
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kdrl_pl.files import JSONLines
from kdrl_pl.summary import format_table
from kdrl_pl.view.closing import closing
from kdrl_pl.view.completions import Shown, choose
from kdrl_pl.view.live import completions_table, render
from kdrl_pl.view.state import RunState

WIDTH = 96


def main() -> None:
    """The newest stored rollout: its completions, the lines under them, and the end of the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("terminal.svg"))
    options = parser.parse_args()
    file = max((options.run / "rollouts").glob("*.jsonl"))
    rollout, completions = int(file.stem), _completions(JSONLines(file).read())
    rows = [row for row in JSONLines(options.run / "metrics.jsonl").read() if "validation" not in row]
    validations = [row for row in JSONLines(options.run / "metrics.jsonl").read() if "validation" in row]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ kdrl fit --config configs/{options.run.parent.name}.yaml\n", style="bold"))
    console.print(Text(f"validation after {validations[-2]['rollout'] + 1} rollouts"))
    console.print(Text(format_table(None, _sets(validations[-2]))))
    console.print(completions_table(rollout, completions))
    console.print()
    console.print(render(_state(options.run.parent.name, rows, rollout), WIDTH))
    console.print(Text("\n[…]\n", style="dim"))
    console.print(Text(f"{closing(options.run)}\n"))  # without room below it the last line loses its underscores
    picture = console.export_svg(title="kdrl fit", unique_id="terminal")
    options.output.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))  # no font from the net


def _state(name: str, rows: list[dict], rollout: int) -> RunState:
    """In the update of `rollout`, at the pace that the run had."""
    spent = iter([0.0, sum(row["time/step"] for row in rows[:rollout]), *[1e9] * 99])
    now = [next(spent)]
    state = RunState(name, len(rows), lambda: now[0])
    state.start(0)
    for row in rows[:rollout]:
        state.finish(row["rollout"] + 1, {k: v for k, v in row.items() if v is not None})
    now[0] = next(spent)
    for phase in ("rollout", "reward", "score", "teacher", "update"):
        state.begin(phase)
    now[0] += 0.5 * rows[rollout]["time/update"]
    return state


def _completions(rows: list[dict]) -> list[Shown]:
    advantages = [row["advantage"] or 0.0 for row in rows]
    chosen = choose(rows[0]["rollout"], advantages, [row["reward"] for row in rows])
    return [
        Shown(
            why,
            rows[i]["prompt"],
            rows[i]["completion"],
            rows[i]["reward"],
            rows[i]["advantage"],
            "right" if rows[i]["correct"] else "cut off" if rows[i]["truncated"] else "wrong",
            rows[i]["parts"],
        )
        for why, i in chosen.items()
    ]


def _sets(row: dict) -> dict[str, dict[str, float]]:
    """set -> metrics, from the names of a row of metrics.jsonl."""
    sets: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        if name.count("/") == 2:
            _, set_, metric = name.split("/")
            sets.setdefault(set_, {})[metric] = value
    return sets


if __name__ == "__main__":
    main()
