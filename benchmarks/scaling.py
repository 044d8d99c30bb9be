"""What two processes (gloo) cost against one on this machine: time of a rollout, collectives, bytes, memory.

    python benchmarks/scaling.py [--layouts one,ddp,fsdp2] [--output FILE]

The same rollout and update, cut over the processes: workload a with more prompts. Two processes of one thread stand
beside one process of one thread, which tells what communication and doubled work cost, and beside one of two threads,
which is what the second core is otherwise for. Collectives are counted in a step of their own, which is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.markdown import collectives_table
from common.processes import MB, PeakMemory, run_json, save
from common.workloads import WORKLOADS, Workload, miniature

LAYOUTS = {  # name -> processes, threads of each
    "one": (1, 1),
    "one, 2 threads": (1, 2),
    "ddp": (2, 1),
    "fsdp2": (2, 1),
}
BUDGET = 1024  # tokens of a micro-batch: several on every process
PHASES = ("rollout", "teacher", "update", "step")


def sized(small: bool) -> Workload:
    """Rows that two processes share evenly."""
    workload = replace(WORKLOADS["a"], prompts=4, steps=3)
    return replace(miniature(workload), prompts=4) if small else workload


def watcher(steps: int) -> Any:
    """A callback that takes the memory of `steps` steps after the first, and counts the collectives of one more."""
    from lightning.pytorch import Callback
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Collectives(TorchDispatchMode):
        """Calls and bytes of each collective, by its name in c10d; of an all-gather the gathered tensor."""

        def __init__(self) -> None:
            super().__init__()
            self.found: dict[str, list[float]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                import torch

                tensors = [leaf for leaf in tree_leaves(list(args)) if isinstance(leaf, torch.Tensor)]
                size = max((t.numel() * t.element_size() for t in tensors), default=0)
                calls = self.found.setdefault(func._schema.name.partition("::")[2].strip("_"), [0, 0.0])
                calls[0] += 1
                calls[1] += size
            return func(*args, **(kwargs or {}))

    class Watch(Callback):
        def __init__(self) -> None:
            self.mode = Collectives()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == steps + 1:
                self.mode.__enter__()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:  # all is imported, and the optimizer has its state
                self.memory = PeakMemory()
            if batch_idx == steps:
                self.peak_mb = self.memory.mb()
            if batch_idx == steps + 1:
                self.mode.__exit__(None, None, None)

    return Watch()


def estimated(workload: Workload, layout: str, ranks: int) -> dict[str, float]:
    """What `kdrl_pl.estimate` says: bytes of the collectives that carry weights and gradients, MB at the peak."""
    import tempfile

    from common import kdrl_side
    from common.workloads import write_models

    from kdrl_pl.estimate.memory import memory
    from kdrl_pl.estimate.models import without_numbers
    from kdrl_pl.estimate.plan import Batch, Plan
    from kdrl_pl.estimate.work import work
    from kdrl_pl.rollout.sampling import Sampling

    with tempfile.TemporaryDirectory() as folder:
        write_models(workload, Path(folder))
        module = kdrl_side.make_module(Path(folder), max_tokens_per_micro_batch=BUDGET)
        plan = Plan(
            module,
            without_numbers(module),
            Batch(workload.prompts // ranks, workload.group, workload.lengths(1)[: workload.rows // ranks]),
            workload.prompt_tokens,
            Sampling(max_tokens=workload.response_tokens),
            layout=layout,
            ranks=ranks,
            is_ragged=False,
        )
        found = memory(plan)
        sent = sum(sum(phase.sent.values()) for phase in work(plan).values())
    return {"sent_bytes": sent, "peak_mb": (found.total(found.peak) - sum(found.held.values())) / MB}


def ring_bytes(found: dict[str, list[float]], ranks: int) -> float:
    """Bytes that each rank sends in a ring: twice the others' share in an all-reduce, once in the other two."""
    share = (ranks - 1) / ranks
    return share * sum((2 if name == "allreduce" else 1) * size for name, (_, size) in found.items())


def measure(layout: str, workload: Workload) -> dict[str, Any]:
    """Times, collectives and memory of this process, which is one of the layout's."""
    from common import kdrl_side

    ranks, _ = LAYOUTS[layout]
    strategy: Any = "ddp" if layout == "ddp" else "auto"
    if layout == "fsdp2":
        from kdrl_pl.fsdp2 import FSDP2Strategy

        strategy = FSDP2Strategy()
    watch = watcher(workload.steps)
    result = kdrl_side.run(
        replace(workload, steps=workload.steps + 1),
        ranks=ranks,
        strategy=strategy,
        watch=[watch],
        max_tokens_per_micro_batch=BUDGET,
    )
    timed = result["steps"][: workload.steps]
    name = layout.partition(",")[0]
    return {
        "seconds": {phase: statistics.median(step[phase] for step in timed) for phase in PHASES},
        "collectives": {name: {"calls": calls, "bytes": size} for name, (calls, size) in watch.mode.found.items()},
        "sent_bytes": ring_bytes(watch.mode.found, ranks),
        "tokens": workload.rows * (workload.prompt_tokens + workload.response_tokens),
        "peak_mb": watch.peak_mb,
        "estimated": estimated(workload, "single" if name == "one" else name, ranks),
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", default=";".join(LAYOUTS), help="semicolon between: " + "; ".join(LAYOUTS))
    parser.add_argument("--threads", type=int, help="of every process, in place of the layout's own")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.layouts.split(";")) - LAYOUTS.keys()
    if unknown:
        raise ValueError(f"no layout {'; '.join(sorted(unknown))}; expected some of {'; '.join(LAYOUTS)}")
    if options.json:
        import torch

        torch.set_num_threads(options.threads)
        result = measure(options.layouts, sized(options.miniature))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            Path(options.json).write_text(json.dumps(result))
        return
    from common.machine import description

    report: dict[str, Any] = {"machine": {**description(), "threads": "1 or 2"}, "layouts": {}}
    for name in options.layouts.split(";"):
        threads = options.threads or LAYOUTS[name][1]
        job = [__file__, "--layouts", name, "--threads", str(threads), *(["--miniature"] if options.miniature else [])]
        found = run_json(job, threads)
        report["layouts"][name] = {"processes": LAYOUTS[name][0], "threads": threads, **found}
        save(report, options.output)
    print(collectives_table(report))


if __name__ == "__main__":
    main()
