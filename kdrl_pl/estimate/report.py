"""An estimate as plain numbers, and those as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kdrl_pl.estimate.memory import memory
from kdrl_pl.estimate.models import count
from kdrl_pl.estimate.plan import Plan
from kdrl_pl.estimate.work import tokens, work

Rates = tuple[float, float, float]  # operations, bytes of device memory, bytes of the link, each per second


def report(plan: Plan, rates: Rates | None = None) -> dict[str, Any]:
    """Everything that is known of a run before it runs: bytes, tokens, operations; seconds where rates are given."""
    found, phases = memory(plan), work(plan)
    module = plan.module
    return {
        "student": {"path": module.student_path, "parameters": count(plan.models.at_rest)},
        "teachers": [{"path": each.path, "parameters": count(each.model)} for each in plan.models.teachers],
        "layout": plan.layout,
        "ranks": plan.ranks,
        "nodes": plan.nodes,
        "device": "cpu" if plan.is_cpu else "gpu",
        "precision": "bf16-mixed" if plan.autocast else "32-true",
        "tokens": tokens(plan),
        "memory": {
            "held": found.held,
            "phases": {phase: {"parts": parts, "total": found.total(phase)} for phase, parts in found.phases.items()},
            "peak": found.peak,
            "total": found.total(found.peak),
        },
        "checkpoint_bytes": found.checkpoint,
        "export_bytes": found.export,
        "work": {name: asdict(each) for name, each in phases.items()},
        "least_seconds": None if rates is None else {name: each.seconds(*rates) for name, each in phases.items()},
        "updates_per_rollout": plan.updates,
    }


def table(told: dict[str, Any]) -> str:
    """The report in lines of text."""
    return "\n".join(_lines(told))


def _lines(told: dict[str, Any]) -> Iterator[str]:
    teachers = ", ".join(f"{t['path']} ({_count(t['parameters'])})" for t in told["teachers"])
    yield f"student   {told['student']['path']} ({_count(told['student']['parameters'])})"
    yield f"teacher   {teachers or 'none in this process'}"
    where = f"{told['ranks']} {told['device']} rank{'s' * (told['ranks'] > 1)} on {told['nodes']} node(s)"
    yield f"layout    {told['layout']}, {where}, {told['precision']}"
    number = told["tokens"]
    yield (
        f"rollout   {number['rows']:,} rows, {number['prompt']:,} prompt and {number['response']:,} response tokens at "
        f"most; {told['updates_per_rollout']} update(s) of {number['per update']:,} tokens; "
        f"{number['micro-batches of a rank']:,} micro-batches on a rank; {number['teacher']:,} teacher tokens"
    )
    memory_ = told["memory"]
    names = list(dict.fromkeys([*memory_["held"], *(n for p in memory_["phases"].values() for n in p["parts"])]))
    phases = memory_["phases"]
    width = max(map(len, names))
    yield ""
    yield f"{'GB on each rank':<{width}}" + "".join(f"{phase:>12}" for phase in phases)
    for name in names:
        row = [memory_["held"].get(name, phases[phase]["parts"].get(name, 0)) for phase in phases]
        if any(row):
            yield f"{name:<{width}}" + "".join(f"{_gb(value):>12}" for value in row)
    yield f"{'together':<{width}}" + "".join(f"{_gb(phases[phase]['total']):>12}" for phase in phases)
    above = (
        "what malloc keeps of freed tensors"
        if told["device"] == "cpu"
        else "the GPU's context, and what its allocator keeps"
    )
    yield f"the peak is the {memory_['peak']}: {_gb(memory_['total'])} GB of tensors, and on top {above}"
    yield ""
    seconds = told["least_seconds"]
    yield f"{'each rank, each rollout':<{width}}{'TFLOP':>12}{'GB read':>12}{'GB sent':>12}{'GB copied':>12}" + (
        "" if seconds is None else f"{'least s':>12}"
    )
    for name, each in told["work"].items():
        line = f"{name:<{width}}{each['operations'] / 1e12:>12.4g}{_gb(each['read']):>12}"
        line = f"{line:<{width + 24}}{_gb(sum(each['sent'].values())):>12}{_gb(each['copied']):>12}"
        yield line + ("" if seconds is None else f"{seconds[name][0]:>12.3g} {seconds[name][1]}")
    yield ""
    yield f"a checkpoint {_gb(told['checkpoint_bytes'])} GB, an export {_gb(told['export_bytes'])} GB on disk"


def _gb(size: float) -> str:
    return "-" if not size else f"{size / 1e9:.3g}" if size < 1e9 else f"{size / 1e9:,.1f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
