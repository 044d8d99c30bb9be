"""Memory of one rank: what is held through a run, and what each phase takes on top.

Bytes of tensors at their peak. What an allocator keeps of freed ones, and the context of a GPU, come on top of it.

FSDP2 is arithmetic here, by what `fully_shard` does: shards of weights, gradients and optimizer state; embeddings, head
and two layers gathered at a time in an update, all of the student in a rollout. Between micro-batches it keeps whole
gradients, since they are summed over ranks once per update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdrl_pl.estimate import passes, rollout
from kdrl_pl.estimate.live_bytes import nbytes
from kdrl_pl.estimate.models import bytes_at_rest, count, dequantised_bytes, layer_counts
from kdrl_pl.estimate.plan import Batch, Plan
from kdrl_pl.models.loading import DTYPES

if TYPE_CHECKING:
    from kdrl_pl.teacher import FrozenTeacher

ROW_BYTES = 8 + 1 + 1 + 5 * 4 + 1  # of an Experience per token: ids, two masks, five numbers, the teacher's mask
Parts = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank.

    Args:
        held: part -> bytes that are there through the whole run.
        phases: phase -> part -> bytes on top of that.
        checkpoint: bytes of one checkpoint on disk.
        export: bytes of the student as a model folder in its own dtype.
    """

    held: Parts
    phases: dict[str, Parts]
    checkpoint: int
    export: int

    def total(self, phase: str) -> int:
        """Peak of a phase."""
        return sum(self.held.values()) + sum(self.phases[phase].values())

    @property
    def peak(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.total)


def memory(plan: Plan) -> Memory:
    """Bytes of every phase of a run."""
    update = passes.update(plan)
    held = _held(plan, update)
    phases: dict[str, Parts] = {}
    for name, batch in (("rollout", plan.training), ("validation", plan.validation)):
        if batch is not None and plan.in_process:
            phases[name] = _rollout(plan, batch)
    rows = plan.training.rows * (plan.prompt_tokens + max(plan.training.response_tokens)) * ROW_BYTES
    kept = {"rows": rows, "teacher's hidden states": passes.hidden_bytes(plan)}
    if plan.module.needs_teacher and plan.module.teacher.model is not None:
        phases["teacher"] = {**kept, **_teacher(plan)}
    phases["update"] = {**kept, **_update(plan, update)}
    trained = sum(p.numel() * p.element_size() for p in plan.models.at_rest.parameters() if p.requires_grad)
    whole = bytes_at_rest(plan.models.at_rest)
    saved = trained if plan.module.adapter is not None else whole
    return Memory(held, phases, saved + update.state, whole)


def _held(plan: Plan, update: passes.UpdateBytes) -> Parts:
    shards = plan.ranks if plan.layout == "fsdp2" else 1
    off = plan.cpu_offload and not plan.is_cpu
    weights = bytes_at_rest(plan.models.at_rest, plan.models.quantization)
    held = {
        "student": 0 if off else weights // shards,
        "optimizer": 0 if off else update.state // shards,
        "teacher": 0,
    }
    for teacher in plan.models.teachers:
        waits = teacher.offload and not plan.is_cpu
        own = bytes_at_rest(teacher.model, teacher.quantization)
        held["teacher"] += 0 if waits else own // (plan.ranks if teacher.sharded else 1)
        held["teacher"] += _kept_head(plan, teacher)
    if plan.models.has_reference:
        held["reference"] = weights
    if plan.layout == "ddp":
        held["gradient buckets"] = _gradient_bytes(plan)
    return held


def _rollout(plan: Plan, batch: Batch) -> Parts:
    found = rollout.rollout(plan, batch)
    gathered = count(plan.models.student) * _gathered_size(plan) if plan.layout == "fsdp2" else 0
    return {
        "gathered weights": gathered,
        "cast weights": found.weights,
        "key-value cache": found.cache,
        "passes": found.peak - found.weights - found.cache,
    }


def _teacher(plan: Plan) -> Parts:
    teacher = plan.module.teacher
    parts = {"passes": passes.teacher_pass(plan)}
    if teacher in plan.models.teachers:
        dtype = DTYPES[teacher.dtype]
        parts["passes"] += dequantised_bytes(teacher.model, teacher.quantization, dtype)
        if teacher.sharded and plan.ranks > 1:
            layer, root = layer_counts(teacher.model)
            parts["gathered weights"] = (2 * layer + root) * dtype.itemsize
        if teacher.offload and not plan.is_cpu:
            kept = _kept_head(plan, teacher)
            parts["teacher's weights"] = bytes_at_rest(teacher.model, teacher.quantization) - kept
    return parts


def _kept_head(plan: Plan, teacher: FrozenTeacher) -> int:
    """The whole head, which the loss reads where it reads the teacher's vocabulary: a sharded teacher gathers it once,
    an offloaded one leaves it on the device."""
    apart = (teacher.sharded and plan.ranks > 1) or (teacher.offload and not plan.is_cpu)
    return nbytes([teacher.model.head().weight]) if apart and passes.keeps_hidden(plan) else 0


def _update(plan: Plan, update: passes.UpdateBytes) -> Parts:
    if plan.layout != "fsdp2":
        arisen = update.gradients if not update.is_one else 0
        most = max(arisen + update.activations, update.gradients + update.step)
        return {"gradients": update.gradients, "passes": most - update.gradients}
    layer, root = layer_counts(plan.models.student)
    size, own = _gathered_size(plan), _gradient_bytes(plan)
    shards = 0 if plan.cpu_offload and not plan.is_cpu else own // plan.ranks
    gathered = (2 * layer + root) * size if plan.reshard else count(plan.models.student) * size
    # whole gradients until the last micro-batch of an update; with only one, those of the layer at hand and the root
    gradients = shards + (layer + root) * (size + 4) if update.is_one else own + layer * 4
    passing = max(update.activations, update.step // plan.ranks)
    return {"gathered weights": gathered, "gradients": gradients, "passes": passing}


def _gathered_size(plan: Plan) -> int:
    """Bytes of a gathered weight."""
    return next(iter(plan.models.student.parameters())).element_size()


def _gradient_bytes(plan: Plan) -> int:
    return sum(p.numel() * p.element_size() for p in plan.models.at_rest.parameters() if p.requires_grad)
