"""One optimizer step: micro-batches, clipping, step; or none, with nothing to learn or a number that is not finite."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from kdrl_pl import phases
from kdrl_pl.errors import RunError
from kdrl_pl.experience import Experience
from kdrl_pl.metrics import MetricSums
from kdrl_pl.optim import clip_gradients
from kdrl_pl.parallel import all_reduce_max, gradient_sync, world_size

if TYPE_CHECKING:
    from kdrl_pl.data.prompts import PromptBatch
    from kdrl_pl.module import KDRLModule

log = logging.getLogger(__name__)


def run_update(module: KDRLModule, rows: Experience, batch: PromptBatch, sums: MetricSums, is_first: bool) -> None:
    """One step on these rows; every rank calls it.

    Args:
        module: student, objective and optimizer.
        rows: this rank's rows of the update, scored.
        batch: the rollout they are of.
        sums: receives the metrics.
        is_first: the weights are still those that sampled, so that sampler and trainer can be compared.

    Raises:
        RunError: sampler and trainer disagree, or too many steps in a row had no finite gradient.
    """
    phases.begin("update")
    optimizer, rollout = module.optimizers(), batch.rollout
    sums.merge(module.prepare(rows, rollout, rows.old_logprobs if is_first else None))
    movable = rows[module.objective.active(rows, rollout)]  # no term can move the others; they are in the weights
    sums.add("perf/update_tokens_per_s", float(movable.attention_mask.sum()), 0.0)
    passes = module.micro_batch_rows(movable)
    is_finite = torch.ones((), dtype=torch.bool, device=module.device)
    for number, index in enumerate(passes):
        phases.advance(number, len(passes))
        part = movable[index] if index else weightless(rows[:1])
        with gradient_sync(module, enabled=number == len(passes) - 1):
            output = module.loss(part, rollout)
            module.manual_backward(output.loss * world_size())  # ranks' gradients are averaged; we want the sum
        is_finite &= output.loss.isfinite() & output.logprobs.isfinite().all()
        sums.add("train/loss", output.loss, 0.0)
        for name, value in output.parts.items():
            sums.add(f"train/{name}_loss", value, 0.0)
        if index:
            sums.merge(output.metrics)
            if is_first and part.behavior_logprobs is not None:
                module.sampler_check.measure(output.logprobs, part, sums)
    # A loss is a sum over micro-batches and ranks, and a mean over updates only: one count per update.
    for name in ("loss", *(f"{term}_loss" for term in module.objective.terms)):
        sums.add(f"train/{name}", 0.0, 1.0 / world_size())
    if is_first and batch.sampler_is_exact:
        of_trainer = "bfloat16" if "bf16" in str(module.trainer.precision) else module.dtype_name
        module.sampler_check.run(sums, module.device, of_trainer, batch.sampler_dtype)
    if not passes:
        module.skipped_steps += 1
        log.warning("step skipped: no row carries a signal: all rewards are equal and nothing is distilled")
        return
    norm = clip_gradients(module.student, module.gradient_clip)
    sums.add("train/grad_norm", norm)
    if all_reduce_max(int(not (is_finite & norm.isfinite())), module.device):
        optimizer.zero_grad()
        return _skip(module, batch, float(norm))
    module.is_between_updates = True
    optimizer.step()
    optimizer.zero_grad()
    module.skipped_in_a_row = 0


def _skip(module: KDRLModule, batch: PromptBatch, norm: float) -> None:
    """Count a step that did not call the optimizer because of a number that is not finite, and keep its rollout.

    Every rank does so. A step without signal between two such steps does not begin the count anew: it mended nothing.
    """
    module.skipped_steps += 1
    module.skipped_in_a_row += 1
    log.warning("step skipped: a loss, log-prob or gradient of rollout %d is not finite (norm %g)", batch.rollout, norm)
    if module.nonfinite is not None:
        module.nonfinite.write(batch.rollout, batch.experience)
    if module.skipped_in_a_row >= module.max_skipped_steps:
        raise RunError(
            f"{module.skipped_in_a_row} steps in a row had a loss, log-prob or gradient that is not finite (last: "
            f"rollout {batch.rollout}); the weights are those of the last good step. Lower the learning rate, bound "
            "the distillation (model.distillation.transform: clip) or look at the rollouts kept in the run folder's "
            "nonfinite/"
        )


def weightless(rows: Experience) -> Experience:
    """A row that keeps a rank in step with the others and moves nothing; changed in place, and returned."""
    rows.token_weights = torch.zeros_like(rows.token_weights)
    rows.kd_weights = torch.zeros_like(rows.kd_weights)
    rows.slopes = None if rows.slopes is None else torch.zeros_like(rows.slopes)
    return rows
