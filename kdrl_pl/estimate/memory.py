"""Memory of one rank: what is held through a phase, and what the phase takes on top, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdrl_pl.estimate import passes, rollout
from kdrl_pl.estimate.live_bytes import nbytes
from kdrl_pl.estimate.plan import Plan

if TYPE_CHECKING:
    from kdrl_pl.models.language_model import LanguageModel

ROW_BYTES = 8 + 1 + 1 + 5 * 4 + 1  # of an Experience per token: ids, two masks, five numbers, the teacher's mask
Parts = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Args:
        phases: phase -> part -> bytes; a phase's peak is their sum.
        held: of those the parts that are there through the whole run.
    """

    phases: dict[str, Parts]
    held: Parts

    @property
    def peak(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))


def memory(plan: Plan) -> Memory:
    """Bytes of every phase of a run."""
    module = plan.module
    update = passes.update(plan)
    held = {
        "student": nbytes(module.student.parameters()) + nbytes(module.student.buffers()),
        "optimizer": update.state,
        "teacher": teacher_weights(module.teacher) if module.needs_teacher else 0,
    }
    rows = plan.rows * (plan.prompt_tokens + max(plan.response_tokens)) * ROW_BYTES
    hidden = passes.hidden_bytes(plan)
    sampled = rollout.rollout(plan, plan.prompts, plan.group, plan.sampling.max_tokens)
    phases = {"rollout": {**held, "rollout": sampled.peak}}
    if module.needs_teacher:
        phases["teacher"] = {**held, "rows": rows, "hidden": hidden, "pass": passes.teacher_pass(plan)}
    once = len(plan.student_passes.rows) == 1
    micro = update.first if once else update.gradients + update.activations
    phases["update"] = {**held, "rows": rows, "hidden": hidden, "pass": max(micro, update.gradients + update.step)}
    return Memory(phases, held)


def teacher_weights(teacher) -> int:
    return nbytes(teacher.model.parameters()) + nbytes(teacher.model.buffers())
