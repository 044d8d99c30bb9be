"""Student and teacher at work: a tiny rollout, the sampler check, and who answers better."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdrl_pl.data.prompts import Prompt, PromptBatch
from kdrl_pl.doctor.findings import Finding, fail, ok, warn
from kdrl_pl.rollout.callback import EVALUATION
from kdrl_pl.rollout.sample import sample_experience
from kdrl_pl.sampler_check import LIMITS
from kdrl_pl.teacher import FrozenTeacher

if TYPE_CHECKING:
    from kdrl_pl.data.datamodule import PromptDataModule
    from kdrl_pl.models.language_model import LanguageModel
    from kdrl_pl.module import KDRLModule
    from kdrl_pl.rollout.callback import RolloutCallback

_SAMPLES = 2  # responses per prompt


def models(
    module: KDRLModule,
    data: PromptDataModule,
    rollouts: RolloutCallback,
    trainer: Any,
    prompts: Sequence[Prompt],
    max_tokens: int,
) -> Iterator[Finding]:
    """Load the models and let them answer.

    Args:
        module: not loaded yet.
        data: set up for fit.
        rollouts: with its reward set up.
        trainer: for device and precision.
        prompts: to be answered.
        max_tokens: of a response; the run's own budget may be larger.
    """
    module.load(trainer.strategy.root_device)
    budget = rollouts.sampling.max_tokens
    sampling = replace(rollouts.sampling, max_tokens=min(max_tokens, budget))

    def answers(model: LanguageModel) -> tuple[PromptBatch, float]:
        batch = PromptBatch(0, prompts)
        started = time.perf_counter()
        batch.experience = sample_experience(
            batch,
            model,
            data.tokenizer,
            rollouts.engine,
            rollouts.reward,
            samples=_SAMPLES,
            sampling=sampling,
            seed=rollouts.seed,
            number=EVALUATION,
            device=module.device,
            precision=trainer.precision_plugin.forward_context,
        )
        return batch, time.perf_counter() - started

    batch, seconds = answers(module.student)
    rows = batch.experience
    tokens, cut = int(rows.response_mask.sum()), int(rows.truncated.sum())
    text = f"{len(rows)} responses, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, {cut} cut off"
    if cut == len(rows) and sampling.max_tokens == budget:
        yield warn("rollout", text, "no response ends: see the end tokens, or raise rollout.sampling.max_tokens")
    else:
        yield ok("rollout", text + ("" if sampling.max_tokens == budget else f" after {sampling.max_tokens} tokens"))
    yield from _drift(module, rows, batch, trainer)
    teacher: Any = module.teacher
    if type(teacher) is FrozenTeacher:  # one model, in this process: it can answer too
        teacher.load(module.device, data.tokenizer)
        yield _who_is_better(rows, answers(teacher.sampler())[0].experience, cut)


def _drift(module: KDRLModule, rows: Any, batch: PromptBatch, trainer: Any) -> Iterator[Finding]:
    """As the sampler check of a run's first rollout."""
    if not batch.sampler_is_exact:
        yield ok("sampler", "filtered (top_p, top_k or min_p), so not comparable with the trainer")
        return
    with trainer.precision_plugin.forward_context():
        drift = (module.student_logprobs(rows) - rows.behavior_logprobs).abs()[rows.response_mask]
    dtype = batch.sampler_dtype or ("bfloat16" if "bf16" in str(trainer.precision) else module.dtype_name)
    mean, largest, limits = float(drift.mean()), float(drift.max()), LIMITS[dtype]
    text = f"sampler and trainer differ by {mean:.2g} nats per token on average, {largest:.2g} at most"
    if mean > limits[0] or largest > limits[1]:
        cure = "compare attn_implementation, dtype and temperature on both sides"
        yield fail("sampler", f"{text} (limits in {dtype}: {limits[0]:g} and {limits[1]:g})", cure)
    else:
        yield ok("sampler", text)


def _who_is_better(student: Any, teacher: Any, cut: int) -> Finding:
    ours, theirs, number = int(student.correct.sum()), int(teacher.correct.sum()), len(student)
    text = f"right {theirs} of {number} times, the student {ours}"
    if cut or bool(teacher.truncated.any()):
        text += f" ({int(teacher.truncated.sum())} and {cut} responses were cut off)"
    if not theirs:
        return warn("teacher", text, "look at the form of its answers (kdrl predict --rollout.policy teacher)")
    if theirs < ours:
        cure = "--prompts 100 tells better; a teacher that is worse needs configs/arms/competence_gate.yaml"
        return warn("teacher", text, cure)
    return ok("teacher", text)
