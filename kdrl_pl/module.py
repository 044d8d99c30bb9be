"""KDRLModule: the student, its frozen teacher and the objective. One batch is one rollout, with manual optimisation.

The loss is formed in `loss`: log-probs of the current student, then the objective. What it needs beforehand from
rewards, student and teacher is filled in by `score`. Both work without Trainer, callback and data module:

    module = KDRLModule(student="path", teacher=FrozenTeacher("path"))
    module.load()
    module.score(experience)
    module.loss(experience).loss.backward()
"""

from __future__ import annotations

import logging
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from kdrl_pl.errors import RunError
from kdrl_pl.evaluation import Evaluation
from kdrl_pl.experience import Experience
from kdrl_pl.losses import (
    Distillation,
    LossOutput,
    Objective,
    PolicyGradient,
    PolicyOutput,
    ReferenceKL,
    RewardShaping,
)
from kdrl_pl.losses.base import Sums, Term, inside
from kdrl_pl.losses.whole_update import prepare
from kdrl_pl.metrics import MetricSums
from kdrl_pl.models.adapter_files import keep_trained
from kdrl_pl.models.adapters import Lora
from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.models.loading import load_tokenizer, stop_ids
from kdrl_pl.models.reference import Reference
from kdrl_pl.optim import default_optimizer, keep_settings, make_optimizer, set_learning_rate
from kdrl_pl.parallel import all_reduce_sum, check_strategy, give_way, world_size
from kdrl_pl.passes import logprobs_of, pass_rows, shared_prompts
from kdrl_pl.sampler_check import SamplerCheck
from kdrl_pl.saved_state import base_of, check_adapter, restore, state_of
from kdrl_pl.schedules import Schedule, as_schedule
from kdrl_pl.scoring import ask, ask_ahead, fill_in
from kdrl_pl.sequences import update_rows
from kdrl_pl.soundness import named_terms, refuse_unsound
from kdrl_pl.stop_cell import stop_cell
from kdrl_pl.teacher import BaseTeacher, FrozenTeacher
from kdrl_pl.updates import run_update

if TYPE_CHECKING:
    from kdrl_pl.data.prompts import PromptBatch
    from kdrl_pl.models.adapters import EarlierStudent
    from kdrl_pl.records import NonFiniteRollouts


log = logging.getLogger(__name__)


class KDRLModule(LightningModule):
    """Trains a student by reinforcement learning and on-policy distillation at once (KDRL, arXiv 2506.02208).

    Args:
        student: Hugging Face folder or hub name of the model to train.
        teacher: what scores the student's tokens; null where no term needs one.
        adapter: trains a low-rank adapter instead of the student's weights (LoRA); null trains the weights.
        policy_gradient: the reinforcement-learning term; null switches it off (pure distillation).
        distillation: the distillation term; null switches it off (GRPO).
        reward_shaping: the teacher as a reward instead of as a loss, an ablation; not together with distillation.
        terms: further terms of the objective by name, each by class_path; the name appears in the log.
        normaliser: how token losses are averaged: "group" (the paper's), "token" (DAPO), "sequence" (GRPO) or
            "constant" (Dr. GRPO).
        drop_groups_without_signal: groups of equal rewards leave that average in the policy gradient (not in the
            distillation), so that the step does not shrink as they become many; no new ones are drawn for them.
        advantage_scale: "std" divides advantages by the group's standard deviation, "none" does not.
        advantage_eps: added to that standard deviation.
        overlong_filter: truncated responses get advantage 0 and do not enter the mean and deviation of their group;
            they are distilled and counted as before.
        importance_cap: weigh tokens by min(pi_old / pi_sampler, this), because another engine sampled; 2 is usual, null
            is off: the in-process engine samples from the student itself.
        epochs_per_rollout: passes over the rows of a rollout.
        groups_per_update: groups, over all ranks, of one optimizer step; null takes the whole rollout at once.
        optimizer: optimizer of the student's weights, by class_path.
        lr_schedule: what the learning rate is multiplied by, as a schedule over rollouts.
        gradient_clip: largest norm of the gradient; null does not clip.
        max_tokens_per_micro_batch: tokens, padding counted, of one forward and backward pass.
        dtype: of the student's master weights; use the Trainer's precision bf16-mixed to compute in bf16.
        attn_implementation: of the student: "sdpa", "eager", "flash_attention_2"; null is transformers' choice.
        gradient_checkpointing: recompute activations in the backward pass.
        max_skipped_steps: steps with a loss, log-prob or gradient that is not finite, in a row, that stop the run.
        evaluate_kl: measure the KL to the teacher in validation too (one more pass of student and teacher).

    Raises:
        ValueError: settings that do not go together; the message says what to change.
    """

    def __init__(
        self,
        student: str,
        teacher: FrozenTeacher | None = None,
        adapter: Lora | None = None,
        policy_gradient: PolicyGradient | None = PolicyGradient(),  # noqa: B008 - read-only, shown as default in --help
        distillation: Distillation | None = Distillation(),  # noqa: B008
        reward_shaping: RewardShaping | None = None,
        terms: dict[str, Term] | None = None,
        normaliser: str = "group",
        drop_groups_without_signal: bool = False,
        advantage_scale: str = "std",
        advantage_eps: float = 1e-6,
        overlong_filter: bool = False,
        importance_cap: float | None = None,
        epochs_per_rollout: int = 1,
        groups_per_update: int | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_schedule: Schedule | float = 1.0,
        gradient_clip: float | None = 1.0,
        max_tokens_per_micro_batch: int = 8192,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        max_skipped_steps: int = 5,
        evaluate_kl: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.objective = Objective(named_terms(policy_gradient, distillation, terms), importance_cap)
        self.distillation, self.reward_shaping, self.teacher = distillation, reward_shaping, teacher
        refuse_unsound(
            self.objective,
            teacher=teacher,
            policy_gradient=policy_gradient,
            distillation=distillation,
            reward_shaping=reward_shaping,
            normaliser=normaliser,
            advantage_scale=advantage_scale,
            advantage_eps=advantage_eps,
            epochs_per_rollout=epochs_per_rollout,
            groups_per_update=groups_per_update,
            gradient_clip=gradient_clip,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
            max_skipped_steps=max_skipped_steps,
            overlong_filter=overlong_filter,
            adapter=adapter,
        )
        self.reference_kl = next(
            (term for term in self.objective.terms.values() if isinstance(term, ReferenceKL)), None
        )
        self.student_path, self.adapter = student, adapter
        self.strict_loading = adapter is None  # a checkpoint has the adapter only; see saved_state.check_adapter
        self.normaliser, self.advantage_scale, self.advantage_eps = normaliser, advantage_scale, advantage_eps
        self.drop_groups_without_signal, self.overlong_filter = drop_groups_without_signal, overlong_filter
        self.epochs_per_rollout, self.groups_per_update = epochs_per_rollout, groups_per_update
        self.make_optimizer = optimizer
        self.lr_schedule = as_schedule(lr_schedule)
        self.gradient_clip, self.max_tokens_per_micro_batch = gradient_clip, max_tokens_per_micro_batch
        self.dtype_name, self.attn_implementation = dtype, attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.reference = Reference(student, dtype, attn_implementation) if self.reference_kl is not None else None
        self.max_skipped_steps, self.evaluate_kl = max_skipped_steps, evaluate_kl
        self.student: LanguageModel | None = None
        self.rollouts_done = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.nonfinite: NonFiniteRollouts | None = None  # where rollouts of skipped steps are kept; RunFolder's
        self.is_between_updates = False
        self.sampled_tokens = 0
        self.resume_anyway = False
        self.logged: dict[str, float] = {}  # metrics of the last rollout or validation; Lightning's keep stale ones too
        self.sampler_check = SamplerCheck()
        self.evaluation = Evaluation()

    # ---- loading -----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Lightning's hook: load the student, once."""
        if self.student is None:
            self.student = LanguageModel.load(
                self.student_path,
                self.dtype_name,
                attn_implementation=self.attn_implementation,
                gradient_checkpointing=self.gradient_checkpointing,
                adapter=self.adapter,
            ).train()
            if self.adapter is not None:
                self._lend_base()

    def _lend_base(self) -> None:
        """An adapted student is its own reference, and teacher if wanted, with another adapter or none."""
        if self.reference is not None:
            self.reference.lean_on(self.student)
        if isinstance(self.teacher, BaseTeacher):
            self.teacher.lean_on(self.student, self.student_path, base_of(self))

    def setup(self, stage: str) -> None:
        """Lightning's hook: load teacher and reference onto this rank's device, if anything needs them."""
        if self._trainer is not None:
            check_strategy(type(self.trainer.strategy).__name__, self.adapter is not None)
        measures = self.teacher is not None and self.evaluate_kl and stage != "predict"
        if self.needs_teacher if stage == "fit" else measures:
            self.teacher.load(self.device, load_tokenizer(self.student_path))
        if stage == "fit" and self.reference is not None and self.adapter is None:
            self.reference.load(self.device)

    def on_fit_start(self) -> None:
        """Refuse training prompts that the competence gate has not heard of, before the first rollout."""
        if self.distillation is not None and self.distillation.competence is not None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            sets = data.rows["train"].values()
            self.distillation.competence.check(prompt for prompts in sets for prompt in prompts)

    def load(self, device: torch.device | str = "cpu") -> KDRLModule:
        """Student, teacher and reference, for use without a Trainer."""
        self.configure_model()
        self.to(device)
        self.setup("fit")
        return self

    @property
    def iterations_done(self) -> int:
        """Rollouts so far: what checkpoints are named after."""
        return self.rollouts_done

    @property
    def needs_teacher(self) -> bool:
        return self.objective.needs_teacher or self.reward_shaping is not None

    @cached_property
    def stop_cell(self) -> tuple[int, ...]:
        """Ids that are one word between student and teacher, once both are loaded; see kdrl_pl/stop_cell.py."""
        ours = stop_ids(load_tokenizer(self.student_path), self.student.model.generation_config)
        return stop_cell(ours, self.teacher.stop_ids(), self.student.vocab_size)

    # ---- the reuse contract: score, then loss ------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        experience: Experience,
        rollout: int | None = None,
        metrics: dict[str, tuple[float, float]] | None = None,
        teacher_is_asked: bool = False,
    ) -> Experience:
        """Fill in what the objective needs: advantages, weights, old and teacher log-probs. In place, and returned.

        Advantages that are there already stay. Every rank calls it with whole groups.

        Args:
            experience: tokens, masks, rewards, groups, `correct`.
            rollout: number of the rollout, for schedules; None takes the module's own count.
            metrics: receives times and what the teacher said, name -> (sum, count).
            teacher_is_asked: `ask_ahead` has filled in the teacher's part.

        Raises:
            ValueError: a group of one row, or groups that cannot be divided into updates.
        """
        fill_in(self, experience, self.rollouts_done if rollout is None else rollout, metrics, teacher_is_asked)
        return experience

    @torch.no_grad()
    def ask_ahead(self, experience: Experience, rollout: int, metrics: dict[str, tuple[float, float]]) -> None:
        """Ask the teacher before the rewards are known, where they do not decide what it is asked about.

        Args:
            experience: tokens and masks; receives the teacher's log-probs.
            rollout: number of the rollout, for schedules.
            metrics: see `score`.
        """
        ask_ahead(self, experience, rollout, metrics)

    @torch.no_grad()
    def prepare(self, experience: Experience, rollout: int | None = None, logprobs: Tensor | None = None) -> Sums:
        """Before each update: fill in what terms need that look at all of its rows at once (`losses.WholeUpdate`).

        Without such a term nothing happens. Every rank calls it.

        Args:
            experience: rows of one update that `score` has seen, whole groups.
            rollout: number of the rollout, for schedules; None takes the module's own count.
            logprobs: (B, T) of the current student, if they are known; None asks it.

        Returns:
            the loss of such a term and its metrics, which `loss` does not have: name -> (sum, count).
        """

        def current() -> Tensor:
            return self.student_logprobs(experience) if logprobs is None else logprobs

        rollout = self.rollouts_done if rollout is None else rollout
        return prepare(self.objective, current, experience, rollout, all_reduce_sum)

    def loss(self, experience: Experience, rollout: int | None = None) -> LossOutput:
        """The loss of these rows: log-probs of the current student, then the objective (METHOD §1).

        The weights in `experience` are normalised over the whole update, so losses of micro-batches add up.

        Args:
            experience: rows that `score` has seen, or some of them.
            rollout: number of the rollout, for schedules; None takes the module's own count.
        """
        rollout = self.rollouts_done if rollout is None else rollout
        return self.objective(self.policy(experience, rollout), experience, rollout)

    def policy(self, experience: Experience, rollout: int) -> PolicyOutput:
        """What the current student says of the rows, with gradient."""
        of_teacher = experience.teacher_hidden  # None where no token of this rollout is distilled
        scores = self.student.token_logprobs(
            experience.input_ids,
            experience.response_mask,
            experience.temperature,
            read=self.objective.reader(rollout, of_teacher is not None, experience.stop_cell),
            teacher_hidden=of_teacher,
            teacher_head=None if of_teacher is None else self.teacher.head(),
            shared=shared_prompts(experience),
        )
        return PolicyOutput(scores.logprobs, scores.readings)

    @torch.no_grad()
    def student_logprobs(
        self,
        experience: Experience,
        model: LanguageModel | EarlierStudent | None = None,
        of_cells: bool = False,
    ) -> Tensor:
        """(B, T) float32 log-probs of the current student, zero outside the response mask, no gradient.

        Args:
            experience: rows.
            model: a copy of the student to be asked instead of it.
            of_cells: at stop tokens those of their cell, as the teacher's are.
        """
        return logprobs_of(
            self.student if model is None else model, experience, self.micro_batch_rows(experience), of_cells
        )

    def micro_batch_rows(self, experience: Experience) -> list[list[int]]:
        """Row numbers per forward pass, as many passes on every rank: idle ranks get empty ones at the end."""
        return pass_rows(experience, self.max_tokens_per_micro_batch)

    # ---- training ----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """The optimizer's state may be that of a checkpoint; its settings are those of this run."""
        keep_settings(self.optimizers())

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """All updates of one rollout."""
        started, experience, rollout = time.perf_counter(), batch.experience, batch.rollout
        sums = MetricSums(batch.metrics)
        set_learning_rate(self.optimizers(), self.lr_schedule, rollout)
        rows_of = update_rows(experience.group, self.groups_per_update, world_size())
        for epoch in range(self.epochs_per_rollout):
            for j, rows in enumerate(rows_of):
                run_update(self, experience[rows], batch, sums, is_first=epoch == 0 and j == 0)
        seconds = time.perf_counter() - started
        sums.add("time/update", seconds)
        sums.add("perf/update_tokens_per_s", 0.0, seconds)  # the tokens of the rows that went through are in already
        self._log(sums, batch)
        self._reset_reference(rollout)
        self.rollouts_done, self.is_between_updates = rollout + 1, False

    def _log(self, sums: MetricSums, batch: PromptBatch) -> None:
        """One all-reduce, one row in the log."""
        values = sums.reduce(self.device).compute()
        self.sampled_tokens += int(values.pop("perf/tokens", 0))
        values["perf/tokens"] = float(self.sampled_tokens)
        values["train/lr"] = self.optimizers().param_groups[0]["lr"]
        values["train/skipped_steps"] = float(self.skipped_steps)
        for name, term in self.objective.terms.items():
            values[f"train/{name}_coef"] = term.coef.value(batch.rollout)
        self.logged = values
        self.log_dict(values, batch_size=1)
        self._observe()

    def _reset_reference(self, rollout: int) -> None:
        """After the rollouts that `ReferenceKL` names, the reference is the student as it is now."""
        if self.reference_kl is not None and self.reference_kl.resets_after(rollout):
            self.reference.reset(self.student)
            if self.reference_kl.reset_optimizer:
                self.optimizers().state.clear()
            log.info("the reference is the student after rollout %d", rollout)

    def schedules(self) -> dict[str, Schedule]:
        """Every coefficient of the run by its name."""
        schedules = {name: term.coef for name, term in self.objective.terms.items()}
        if self.reward_shaping is not None:
            schedules["reward_shaping"] = self.reward_shaping.coef
        return {**schedules, "lr": self.lr_schedule}

    def _observe(self) -> None:
        """Tell the schedules what was logged; one that stands in two places hears it once."""
        for schedule in {id(s): s for s in self.schedules().values()}.values():
            schedule.observe(self.logged)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.make_optimizer, self.student)

    # ---- evaluation --------------------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        kl = self._kl_to_teacher(batch.experience) if batch.by_student else None
        self.evaluation.update(batch, kl, self.device)

    def on_validation_epoch_end(self) -> None:
        self.logged = self.evaluation.finish("val")
        self.log_dict(self.logged, batch_size=1)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._observe()

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("test"), batch_size=1)

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> PromptBatch:
        return batch

    @torch.no_grad()
    def _kl_to_teacher(self, experience: Experience) -> Tensor | None:
        """(B, 2) float64: sum of `logprobs - teacher_logprobs` over the response, and its tokens; or None."""
        if self.teacher is None or not self.teacher.is_loaded or not self.evaluate_kl:
            return None
        experience.stop_cell = self.stop_cell
        ask(self, experience, experience.response_mask)
        give_way(experience.device)
        ours = self.student_logprobs(experience, of_cells=True)
        gap = inside(ours - experience.teacher_logprobs, experience.response_mask)
        return torch.stack([gap.double().sum(1), experience.response_lengths.double()], dim=1)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is a boundary between rollouts.

        Raises:
            RunError: the weights are those of half a rollout's updates, from which nothing could go on.
        """
        if self.is_between_updates:
            raise RunError(
                f"a checkpoint was asked for in the middle of the updates of rollout {self.rollouts_done}; save in "
                "on_train_batch_end or later"
            )
        checkpoint["kdrl"] = state_of(self)
        if self.adapter is not None:
            keep_trained(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint stands.

        Raises:
            ValueError: it was trained with another tokenizer or under another teacher, and `resume_anyway` is not set;
                or it holds an adapter where there is none, or another one, or the reverse; or kdrl sft wrote it.
        """
        check_adapter(self, checkpoint)
        restore(self, checkpoint["kdrl"])
