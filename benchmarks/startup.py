"""What starting the command line costs: processor time against that of importing Lightning's command line alone.

python benchmarks/startup.py [--repeats 5] [--output FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common.markdown import startup_table
from common.processes import processor_seconds, save, spread

ROOT = Path(__file__).resolve().parents[1]
LIGHTNING = "import lightning.pytorch.cli"
COMMANDS = {
    LIGHTNING: [sys.executable, "-c", LIGHTNING],
    "kdrl --help": [sys.executable, "-m", "kdrl_pl", "--help"],
    "kdrl fit --print_config": [
        *(sys.executable, "-m", "kdrl_pl", "fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--print_config")
    ],
}


def measure(repeats: int) -> dict[str, Any]:
    """Command -> processor and wall-clock seconds, and the ratio to Lightning's; commands take turns.

    Args:
        repeats: of each command, after one that fills the caches.
    """
    processor: dict[str, list[float]] = {name: [] for name in COMMANDS}
    wall: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(repeats + 1):
        for name, command in COMMANDS.items():
            cpu, clock = processor_seconds(command)
            if repeat:
                processor[name].append(cpu)
                wall[name].append(clock)
    return {
        name: {
            "processor": spread(processor[name]),
            "wall": spread(wall[name]),
            "ratio": spread([a / b for a, b in zip(processor[name], processor[LIGHTNING], strict=True)]),
        }
        for name in COMMANDS
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    from common.machine import description

    report = {"machine": description(), "commands": measure(options.repeats)}
    save(report, options.output)
    print(startup_table(report))


if __name__ == "__main__":
    main()
