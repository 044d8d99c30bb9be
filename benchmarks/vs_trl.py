"""Our step against TRL's, on the same work: same weights, prompts, response lengths, in alternating fresh processes.

    python benchmarks/vs_trl.py [--workloads a,b] [--repeats 3] [--threads 2] [--output FILE]

The peer is GRPOTrainer of TRL 1.16.0 with the teacher in place of its reference model. First, losses and gradients of
both must agree on the same rows; then each workload is run on both sides in turn, several times. Prints a Markdown
table. TRL is in the extra `bench`, or anywhere else (`--trl-path`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.markdown import vs_trl_table
from common.processes import run_json, save, spread
from common.workloads import WORKLOADS, Workload, choose, write_models

PHASES = ("rollout", "teacher", "score", "update")
MEASURABLE = 1e-3  # seconds; a phase that one side does without has no ratio
AGREE = 1e-5  # largest relative difference of loss, KL and gradient, fp32


def agreement(workload: Workload, options: argparse.Namespace) -> dict[str, float]:
    """Relative differences of policy loss, KL and gradient between both sides, on the same ragged rows.

    Raises:
        RuntimeError: they are not the same objective.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        write_models(workload, Path(folder))
        results = []
        for side in ("kdrl_pl", "trl"):
            run_side(side, options.named, options, ["--rows", folder])
            results.append(torch.load(Path(folder) / f"{side}.pt"))
    ours, theirs = results
    gradient = ours["gradient"]
    if gradient.keys() != theirs["gradient"].keys():
        raise RuntimeError("the two sides train different weights")
    squares = [float((gradient[n].double() - theirs["gradient"][n].double()).square().sum()) for n in gradient]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
    found = {
        "policy loss": abs(ours["policy_loss"] - theirs["policy_loss"]),  # of size 1 before it cancels in a group
        "KL to the teacher": abs(ours["kl"] - theirs["kl"]) / abs(theirs["kl"]),
        "gradient": math.sqrt(sum(squares)) / norm,
    }
    if max(found.values()) > AGREE:
        raise RuntimeError(f"the two sides do not compute the same: relative differences {found}, limit {AGREE}")
    return found


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of one workload on both sides, and their ratios."""
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "kdrl_pl": []}
    for repeat in range(options.repeats):
        for side in sorted(runs, reverse=bool(repeat % 2)):
            runs[side].append(run_side(side, name, options))
            took = statistics.median(step["step"] for step in runs[side][-1]["steps"])
            print(f"  {name}  {side:8} {took:8.3f} s  {runs[side][-1]['peak_mb']:8.0f} MB", flush=True)
    return {
        "title": WORKLOADS[name].title,
        **{side: {phase: _seconds(results, phase) for phase in ("step", *PHASES)} for side, results in runs.items()},
        "peak_mb": {side: spread([result["peak_mb"] for result in results]) for side, results in runs.items()},
        "speed_ratio": {
            phase: spread(_ratios(runs["trl"], runs["kdrl_pl"], phase))
            for phase in ("step", *PHASES)
            if min(_medians([*runs["kdrl_pl"], *runs["trl"]], phase)) > MEASURABLE
        },
        "memory_ratio": spread(
            [t["peak_mb"] / k["peak_mb"] for t, k in zip(runs["trl"], runs["kdrl_pl"], strict=True)]
        ),
    }


def _medians(results: list[dict[str, Any]], phase: str) -> list[float]:
    """Per process, the median over its steps."""
    return [statistics.median(step[phase] for step in result["steps"]) for result in results]


def _ratios(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], phase: str) -> list[float]:
    return [a / b for a, b in zip(_medians(theirs, phase), _medians(ours, phase), strict=True)]


def _seconds(results: list[dict[str, Any]], phase: str) -> dict[str, float]:
    return spread(_medians(results, phase))


def run_side(side: str, name: str, options: argparse.Namespace, extra: list[str] | None = None) -> Any:
    """One side in a process of its own."""
    arguments = [__file__, "--side", side, "--workloads", name, "--threads", str(options.threads), *(extra or [])]
    arguments += ["--miniature"] if options.miniature else []
    return run_json(arguments, options.threads, options.trl_path if side == "trl" else None)


def side(options: argparse.Namespace) -> None:
    """What a process of one side does."""
    import torch

    torch.set_num_threads(options.threads)
    (workload,) = choose(options.workloads, options.miniature).values()
    if options.side == "trl":
        from common import trl_side as chosen
    else:
        from common import kdrl_side as chosen
    if options.rows:
        prompts, responses = ragged_rows(workload)
        exact = replace(workload, precision="32-true")
        result = chosen.agreement(exact, Path(options.rows), prompts, responses)
        torch.save(result, Path(options.rows) / f"{options.side}.pt")
        result = {}
    else:
        result = chosen.run(workload)
    Path(options.json).write_text(json.dumps(result))


def ragged_rows(workload: Workload) -> tuple[list[list[int]], list[list[int]]]:
    """Two groups of random rows: prompts of 24 tokens, responses of 1 to 12."""
    import random

    numbers = random.Random(0)

    def ids(count: int) -> list[int]:
        return [numbers.randrange(1, workload.vocabulary - 1) for _ in range(count)]

    prompts = [ids(24), ids(24)]
    return [prompts[row // workload.group] for row in range(2 * workload.group)], [
        ids(1 + row * 5 % 12) for row in range(2 * workload.group)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma between: " + ", ".join(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side and workload")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file; workloads already in it that are not run stay")
    parser.add_argument("--trl-path", default=os.environ.get("TRL_PATH"), help="folder TRL 1.16.0 was installed into")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, to see that it works")
    for internal in ("--side", "--rows", "--json"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = choose(options.workloads, options.miniature)
    if options.side:
        return side(options)
    from common.machine import description

    options.named = next(iter(chosen))
    report: dict[str, Any] = {"workloads": {}}
    if options.output and options.output.is_file():
        report = json.loads(options.output.read_text())
    report["machine"] = {**description(), "threads": options.threads, "repeats": options.repeats}
    report["agreement"] = agreement(chosen[options.named], options)
    print("agree to", ", ".join(f"{value:.1e} ({name})" for name, value in report["agreement"].items()), flush=True)
    for name in chosen:
        report["workloads"][name] = compare(name, options)
        ratios = [row["speed_ratio"]["step"]["median"] for row in report["workloads"].values()]
        report["geometric_mean"] = statistics.geometric_mean(ratios)
        save(report, options.output)
    print(vs_trl_table(report))


if __name__ == "__main__":
    main()
