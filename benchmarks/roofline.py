"""How near a KDRL step on this machine is to what its matrix products and its memory allow.

    python benchmarks/roofline.py [--workloads a,c] [--threads 2] [--output FILE]

Measures the rate of large matrix products (fp32 and bf16) and the copy bandwidth, then real steps, and prints per phase
the least time that the counted operations and bytes allow (`common/counting.py` says what is counted) and our share
of it. `score` is one more pass of the student, which a rollout used for one update does without.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import kdrl_side
from common.counting import least_work
from common.machine import copy_rate, description, product_rate, seconds
from common.markdown import roofline_table
from common.processes import save
from common.workloads import Workload, choose, write_models


def ceilings(small: bool) -> dict[str, float]:
    """Operations per second in fp32 and bf16, and bytes per second."""
    size = 256 if small else 2048
    return {
        "fp32_per_s": product_rate("cpu", torch.float32, size),
        "bf16_per_s": product_rate("cpu", torch.bfloat16, size),
        "bytes_per_s": copy_rate("cpu", 1 << 20 if small else 1 << 27),  # 256 MB: far beyond the caches
    }


def score_seconds(workload: Workload) -> float:
    """Seconds of one forward pass of the student over all rows, without gradient."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(workload, Path(folder))
        module = kdrl_side.make_module(Path(folder)).load()
        rows = module.score(kdrl_side.load_rows(module, workload))
        module.student.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=workload.precision == "bf16-mixed"):
            return seconds(lambda: module.student_logprobs(rows))


def measure(workload: Workload, limit: dict[str, float]) -> dict[str, Any]:
    """Phase -> seconds, least seconds and share of the limit."""
    steps = kdrl_side.run(workload)["steps"]
    is_bf16 = workload.precision == "bf16-mixed"
    rates = limit["bf16_per_s" if is_bf16 else "fp32_per_s"], limit["bytes_per_s"]
    table = {}
    for phase in kdrl_side.PHASES:
        # Both are medians over the same steps, whose lengths differ where they are uneven.
        works = [least_work(workload, step, 2 if is_bf16 else 4)[phase] for step in range(1, workload.steps + 1)]
        least = statistics.median(work.least_seconds(*rates) for work in works)
        took = score_seconds(workload) if phase == "score" else statistics.median(step[phase] for step in steps)
        table[phase] = {
            "seconds": took,
            "least_seconds": least,
            "share": least / took,
            "operations": statistics.median(work.operations for work in works),
            "bytes": statistics.median(work.bytes for work in works),
            "bound": works[0].bound(*rates),
        }
    return {"title": workload.title, "phases": table}


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="a,b,c,d", help="comma between; see common/workloads.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, to see that it works")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"machine": description(), "ceilings": ceilings(options.miniature), "workloads": {}}
    for name, workload in choose(options.workloads, options.miniature).items():
        report["workloads"][name] = measure(workload, report["ceilings"])
        save(report, options.output)
    print(roofline_table(report))


if __name__ == "__main__":
    main()
