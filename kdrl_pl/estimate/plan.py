"""What a run would do on each rank: the settings that decide about memory and work, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.models.shared_prompts import SharedPrompts
from kdrl_pl.sequences import group_batches, micro_batches, sharing_pays

if TYPE_CHECKING:
    from kdrl_pl.estimate.models import Models
    from kdrl_pl.models.language_model import LanguageModel
    from kdrl_pl.module import KDRLModule
    from kdrl_pl.rollout.sampling import Sampling


@dataclass(frozen=True)
class Passes:
    """Forward passes over the rows of a rank.

    Args:
        rows: row numbers of each pass, most tokens first.
        shares: the prompt of a group is read once in each.
    """

    rows: list[list[int]]
    shares: bool


@dataclass(frozen=True)
class Batch:
    """Rows that a rollout samples.

    Args:
        prompts, group: prompts x group rows.
        response_tokens: (rows,) tokens of each response.
        is_filtered: top-p, top-k or min-p.
    """

    prompts: int
    group: int
    response_tokens: Sequence[int]
    is_filtered: bool = False

    @property
    def rows(self) -> int:
        return self.prompts * self.group


@dataclass
class Plan:
    """One rollout and its updates on one rank.

    Args:
        module: with settings, its student and teacher without numbers.
        models: from `without_numbers(module)`.
        training: the rows of a rollout on this rank.
        prompt_tokens: of the longest prompt.
        sampling: how responses are drawn.
        validation: the rows of a validation batch; None = no validation.
        max_rows: rows that decode together; None = all.
        refill: waiting rows take the lines of finished ones.
        rollout_dtype: "bfloat16": the sampler has a copy of the weights in it; None = it has none.
        in_process: the student itself samples; another engine's memory is its own.
        layout: "single" (one process), "ddp" or "fsdp2".
        ranks: data-parallel processes.
        nodes: machines they stand on.
        cpu_offload: FSDP2's shards, gradients and optimizer state lie in host memory.
        reshard: FSDP2 lets a layer's gathered weights go between its forward and backward pass.
        is_cpu: the device is a CPU.
        autocast: products are in bfloat16 (bf16-mixed).
        is_ragged: prompts differ in length, so that rows are padded and attention takes a mask.
    """

    module: KDRLModule
    models: Models
    training: Batch
    prompt_tokens: int
    sampling: Sampling
    validation: Batch | None = None
    max_rows: int | None = None
    refill: bool = True
    rollout_dtype: str | None = None
    in_process: bool = True
    layout: str = "single"
    ranks: int = 1
    nodes: int = 1
    cpu_offload: bool = False
    reshard: bool = True
    is_cpu: bool = True
    autocast: bool = False
    is_ragged: bool = True

    @property
    def prompt_lengths(self) -> list[int]:
        """(rows,) all the longest but the first group's, whose prompt lacks a token where prompts are ragged."""
        lengths = [self.prompt_tokens] * self.training.rows
        if self.is_ragged and self.training.prompts > 1 and self.prompt_tokens > 1:
            lengths[: self.training.group] = [self.prompt_tokens - 1] * self.training.group
        return lengths

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        cut = self.module.groups_per_update
        per_pass = 1 if cut is None else max(self.training.prompts * self.ranks // cut, 1)
        return self.module.epochs_per_rollout * per_pass

    @cached_property
    def student_passes(self) -> Passes:
        """Those of one epoch over the rollout."""
        return self._passes(self.module.student, self.module.max_tokens_per_micro_batch)

    @cached_property
    def teacher_passes(self) -> Passes:
        """Those of the teacher, all rows asked about."""
        return self._passes(self.module.teacher.model, self.module.teacher.max_tokens_per_micro_batch)

    def _passes(self, model: LanguageModel, budget: int) -> Passes:
        prompts, responses = self.prompt_lengths, list(self.training.response_tokens)
        group = [row // self.training.group for row in range(self.training.rows)]
        if model.shares_prompts and sharing_pays(prompts, responses, group, budget):
            return Passes(group_batches(prompts, responses, group, budget), True)
        lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return Passes(micro_batches(lengths, budget), False)

    def precision(self) -> AbstractContextManager:
        """What a step computes in: Lightning's autocast keeps no casts."""
        if not self.autocast:
            return nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)

    def experience(self, rows: Sequence[int], shares: bool) -> Experience:
        """These rows as `score` leaves them, real tensors with ids of no meaning, but without `teacher_hidden`."""
        prompts, responses = self.prompt_lengths, self.training.response_tokens
        experience = Experience.from_rows(
            [[0] * prompts[row] for row in rows],
            [[0] * responses[row] for row in rows],
            [0.0] * len(rows),
            [row // self.training.group for row in rows],
            behavior_logprobs=[[0.0] * responses[row] for row in rows],
            max_response_tokens=self.sampling.max_tokens,
        )
        shape = experience.input_ids.shape
        experience.advantages = torch.ones(len(rows))
        experience.token_weights, experience.kd_weights = torch.ones(len(rows)), experience.response_mask.float()
        experience.teacher_mask = experience.response_mask
        for name in ("old_logprobs", "teacher_logprobs", "reference_logprobs", "slopes"):
            setattr(experience, name, torch.zeros(shape))
        experience.temperature, experience.share_prompts = self.sampling.temperature or 1.0, shares
        return experience


def shared(experience: Experience, shares: bool) -> SharedPrompts | None:
    """What a pass over these rows is told of their prompts."""
    return SharedPrompts(experience.group, experience.prompt_lengths) if shares else None


def model_tensors(*models: LanguageModel | None) -> list[Tensor]:
    """Weights and buffers."""
    return [tensor for model in models if model is not None for tensor in (*model.parameters(), *model.buffers())]
