"""Memory, traffic and least times of the runs in docs/scaling.md, by `kdrl estimate`. Nothing is run.

    python benchmarks/layouts.py [--output FILE]

A student of 1.5 and teachers of 7 and 32 billion parameters (configs/estimate) on 8 and 64 GPUs, under the recipe of
configs/kdrl.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from common.markdown import layouts_table
from common.processes import save

BASE = ("configs/kdrl.yaml", "configs/estimate/models.yaml")
DDP, FSDP2 = "configs/estimate/ddp.yaml", "configs/trainer/fsdp2.yaml"
LARGE = "configs/estimate/32b.yaml"
TEACHERS = {kind: f"configs/teacher/{kind}.yaml" for kind in ("8bit", "4bit", "offload", "sharded")}
SERVED = "configs/estimate/served.yaml"
# assumed: an H100's measured products and memory (benchmarks/results/gpu.json), NVLink, a network card of 400 Gb/s
TFLOPS, MEMORY, LINKS = 729, 3008, {8: 450, 64: 50}

RUNS: dict[str, tuple[int, list[str]]] = {
    "7 B, DDP": (8, [DDP]),
    "7 B": (8, [FSDP2]),
    "7 B, 8 bits": (8, [FSDP2, TEACHERS["8bit"]]),
    "7 B, sharded": (8, [FSDP2, TEACHERS["sharded"]]),
    "7 B, offloaded": (8, [FSDP2, TEACHERS["offload"]]),
    "served": (8, [FSDP2, SERVED]),
    "32 B": (8, [FSDP2, LARGE]),
    "32 B, 8 bits": (8, [FSDP2, LARGE, TEACHERS["8bit"]]),
    "32 B, 4 bits": (8, [FSDP2, LARGE, TEACHERS["4bit"]]),
    "32 B, sharded": (8, [FSDP2, LARGE, TEACHERS["sharded"]]),
    "32 B, offloaded": (8, [FSDP2, LARGE, TEACHERS["offload"]]),
    "7 B, DDP on 64": (64, [DDP]),
    "7 B on 64": (64, [FSDP2]),
    "32 B, sharded on 64": (64, [FSDP2, LARGE, TEACHERS["sharded"]]),
}


def arguments_of(ranks: int, overlays: list[str], small: bool = False) -> list[str]:
    """What follows `kdrl estimate`."""
    files = [part for file in (*BASE, *overlays) for part in ("--config", file)]
    if small:
        files += ["--model.student", "checkpoints/testbeds/arithmetic/student", "--rollout.sampling.max_tokens", "16"]
        files += ["--rollout.validation_sampling.max_tokens", "16", "--data.max_prompt_tokens", "16"]
        if SERVED not in overlays:
            files += ["--model.teacher.path", "checkpoints/testbeds/arithmetic/teacher"]
    rates = ["--tflops", str(TFLOPS), "--memory-gb-per-s", str(MEMORY), "--link-gb-per-s", str(LINKS[ranks])]
    return [*files, "--ranks", str(ranks), "--nodes", str(ranks // 8), *rates]


def estimated(arguments: list[str]) -> dict[str, Any]:
    """What it prints, as JSON."""
    from kdrl_pl.cli import estimate

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        estimate.main("estimate", [*arguments, "--json"])
    return json.loads(printed.getvalue())


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=";".join(RUNS), help="semicolon between: " + "; ".join(RUNS))
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, to see that it works")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {}
    for name in options.runs.split(";"):
        ranks, overlays = RUNS[name]
        command = arguments_of(ranks, overlays, options.miniature)
        report[name] = {"command": " ".join(["kdrl", "estimate", *command]), **estimated(command)}
        save(report, options.output)
    print(layouts_table(report))


if __name__ == "__main__":
    main()
