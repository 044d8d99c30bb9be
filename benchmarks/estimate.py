"""What `kdrl estimate` says of memory, beside what fresh processes take.

    python benchmarks/estimate.py [--cases equal,uneven] [--threads 2] [--output FILE]

Each process goes through all that a run imports and sets up with a tiny model first; then it loads the real one and
takes two steps: rollout, teacher, update, optimizer. Measured is how far resident memory rises above what it was before
loading, twice: with every tensor given back when it is freed (MALLOC_MMAP_THRESHOLD_), which is what is estimated; and
as glibc's malloc does it by default, which keeps freed pieces below 32 MB for the next ones. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.markdown import estimate_table
from common.processes import MB, PeakMemory, run_json, save
from common.workloads import WORKLOADS, Shape, Workload, miniature, write_models

THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
PHASES = ("rollout", "teacher", "update")


@dataclass(frozen=True)
class Case:
    """A workload under some settings of the module.

    Args:
        workload: sizes.
        budget: tokens of a micro-batch of the student.
        estimator: of the distillation.
        checkpointing: activations are recomputed.
        attention: of the student.
        max_rows: rows that decode together.
    """

    workload: Workload
    budget: int = 8192
    estimator: str = "k2"
    checkpointing: bool = False
    attention: str | None = None
    max_rows: int | None = None


_LONG = replace(WORKLOADS["a"], response_tokens=256)
_GROUPED = replace(_LONG, student=Shape(320, 800, 6, 10, 2), title="9 M with 2 of 10 heads for keys and values")

CASES = {
    "equal": Case(_LONG),
    "uneven": Case(WORKLOADS["b"]),
    "shared prompt": Case(WORKLOADS["c"]),
    "wide vocabulary": Case(replace(WORKLOADS["d"], vocabulary=65_536)),
    "grouped heads": Case(_GROUPED, budget=2048),
    "recomputed": Case(_LONG, checkpointing=True),
    "full vocabulary": Case(_LONG, estimator="full"),
    "eager": Case(_LONG, attention="eager"),
    "bf16": Case(replace(_LONG, precision="bf16-mixed")),
    "rollout": Case(replace(_GROUPED, prompts=8, response_tokens=192), budget=1024),
}


def make(case: Case, folder: Path) -> Any:
    """The module of a case, not loaded."""
    from common import kdrl_side

    from kdrl_pl.losses import Distillation
    from kdrl_pl.module import KDRLModule
    from kdrl_pl.teacher import FrozenTeacher

    return KDRLModule(
        str(folder / "student"),
        FrozenTeacher(str(folder / "teacher"), max_tokens_per_micro_batch=case.budget),
        distillation=Distillation(kdrl_side.COEF, estimator=case.estimator),
        max_tokens_per_micro_batch=case.budget,
        gradient_checkpointing=case.checkpointing,
        attn_implementation=case.attention,
    )


def estimate(case: Case, folder: Path) -> dict[str, float]:
    """MB per phase, by `kdrl_pl.estimate`."""
    from kdrl_pl.estimate.memory import memory
    from kdrl_pl.estimate.models import without_numbers
    from kdrl_pl.estimate.plan import Batch, Plan
    from kdrl_pl.rollout.sampling import Sampling

    workload, module = case.workload, make(case, folder)
    found = memory(
        Plan(
            module,
            without_numbers(module),
            Batch(workload.prompts, workload.group, workload.lengths(1)),
            workload.prompt_tokens,
            Sampling(max_tokens=workload.response_tokens),
            max_rows=case.max_rows,
            autocast=workload.precision != "32-true",
            is_ragged=False,
        )
    )
    return {phase: found.total(phase) / MB for phase in PHASES}


def steps(case: Case, folder: Path, count: int, measured: Callable[[str], Any]) -> None:
    """Load the models and take some steps; `measured(phase)` is a context around each phase."""
    import torch
    from common import kdrl_side

    from kdrl_pl.optim import make_optimizer
    from kdrl_pl.rollout.in_process import InProcessEngine
    from kdrl_pl.rollout.sampling import Sampling

    workload = case.workload
    module = make(case, folder).load()
    optimizer = make_optimizer(module.make_optimizer, module.student)
    engine, lengths = InProcessEngine(case.max_rows), kdrl_side.Lengths()
    precision = torch.autocast("cpu", torch.bfloat16, workload.precision != "32-true", cache_enabled=False)
    for _ in range(count):
        rows = kdrl_side.load_rows(module, workload)
        prompts = [
            rows.input_ids[row, : rows.prompt_lengths[row]].tolist() for row in range(0, workload.rows, workload.group)
        ]
        keys = list(range(workload.rows))
        lengths.of_key = {k: n for k, n in zip(keys, workload.lengths(1), strict=True) if n < workload.response_tokens}
        with precision, lengths.forced():
            with measured("rollout"), torch.no_grad():
                engine.sync(module.student, [workload.vocabulary - 1])
                sampled = engine.generate(prompts, workload.group, Sampling(max_tokens=workload.response_tokens), keys)
                assert [len(ids) for ids in sampled.token_ids] == workload.lengths(1)
            with measured("teacher"):
                module.score(rows, 0)
            with measured("update"):
                for index in module.micro_batch_rows(rows):
                    module.loss(rows[index], 0).loss.backward()
                optimizer.step()
                optimizer.zero_grad()


def measure(case: Case) -> dict[str, Any]:
    """Estimated and measured MB of each phase, in this process."""
    found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    with tempfile.TemporaryDirectory() as name:
        folder, tiny = Path(name), Path(name) / "tiny"
        small = replace(case, workload=miniature(case.workload))
        write_models(small.workload, tiny)
        write_models(case.workload, folder)
        estimated = estimate(case, folder)
        steps(small, tiny, 1, lambda phase: nullcontext())
        start = PeakMemory()

        @contextmanager
        def measured(phase: str) -> Iterator[None]:
            memory = PeakMemory()
            yield
            above = (memory.before - start.before) * 1024 / MB + memory.mb()
            found[phase] = max(found[phase], above)

        steps(case, folder, 2, measured)
    return {
        "title": case.workload.title,
        "estimated": estimated,
        "measured": found,
    }


@contextmanager
def _given_back_at_once() -> Iterator[None]:
    """Processes started inside map every tensor of 64 kB and more on its own."""
    os.environ[THRESHOLD] = str(64 * 1024)
    try:
        yield
    finally:
        del os.environ[THRESHOLD]


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="comma between: " + ", ".join(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.cases.split(",")) - CASES.keys()
    if unknown:
        raise ValueError(f"no case {', '.join(sorted(unknown))}; expected some of {', '.join(CASES)}")
    if options.json:
        import torch

        torch.set_num_threads(options.threads)
        case = CASES[options.cases]
        result = measure(replace(case, workload=miniature(case.workload)) if options.miniature else case)
        Path(options.json).write_text(json.dumps(result))
        return
    from common.machine import description

    report: dict[str, Any] = {"machine": {**description(), "threads": options.threads}, "cases": {}}
    for name in options.cases.split(","):
        job = [__file__, "--cases", name, "--threads", str(options.threads)]
        job += ["--miniature"] if options.miniature else []
        by_default = run_json(job, options.threads)["measured"]
        with _given_back_at_once():
            found = run_json(job, options.threads)
        ratio = max(found["estimated"].values()) / max(found["measured"].values())
        report["cases"][name] = {**found, "by_default": by_default, "ratio": ratio}
        save(report, options.output)
    print(estimate_table(report))


if __name__ == "__main__":
    main()
