"""How a step's cost grows with its rows: time per token of rollout and update, and memory against tokens.

    python benchmarks/scaling_rows.py [--rows 16,32,64,128,256] [--threads 2] [--output FILE]

The models of workload a, groups of 8, each number of rows in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.markdown import scaling_table
from common.processes import run_json, save
from common.workloads import Workload, choose

TIMED = ("rollout", "teacher", "update")


def sized(rows: int, small: bool) -> Workload:
    """Workload a with another number of rows."""
    workload = choose("a", small)["a"]
    return replace(workload, prompts=rows // workload.group, steps=1 if small else 3)


def measure(workload: Workload, budget: int) -> dict[str, Any]:
    """Seconds per response token of each phase, and peak memory, in this process."""
    from common import kdrl_side

    result = kdrl_side.run(workload, max_tokens_per_micro_batch=budget)
    tokens = workload.rows * workload.response_tokens
    return {
        "rows": workload.rows,
        "tokens": tokens,
        "peak_mb": result["peak_mb"],
        **{phase: statistics.median(step[phase] for step in result["steps"]) / tokens for phase in TIMED},
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="16,32,64,128,256", help="numbers of rows, multiples of 8, comma between")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--budget", type=int, default=8192, help="tokens of a micro-batch; the default is the library's"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.json:
        import torch

        torch.set_num_threads(options.threads)
        result = measure(sized(int(options.rows), options.miniature), options.budget)
        Path(options.json).write_text(json.dumps(result))
        return
    from common.machine import description

    report: dict[str, Any] = {"machine": {**description(), "threads": options.threads}, "rows": []}
    for rows in options.rows.split(","):
        job = [__file__, "--rows", rows, "--threads", str(options.threads), "--budget", str(options.budget)]
        report["rows"].append(run_json(job + (["--miniature"] if options.miniature else []), options.threads))
        save(report, options.output)
    for phase in TIMED:
        costs = [row[phase] for row in report["rows"]]
        report.setdefault("last_over_least", {})[phase] = costs[-1] / min(costs)
    save(report, options.output)
    print(scaling_table(report))


if __name__ == "__main__":
    main()
