"""What the objective needs beforehand: old log-probs, advantages, weights, and the teacher's log-probs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdrl_pl import phases, signals
from kdrl_pl.advantages import group_advantages
from kdrl_pl.errors import TeacherLost
from kdrl_pl.experience import Experience
from kdrl_pl.losses.weights import experience_weights
from kdrl_pl.parallel import all_reduce_max, all_reduce_sum, give_way, world_size
from kdrl_pl.sequences import sharing_pays, update_rows

if TYPE_CHECKING:
    from kdrl_pl.losses import Distillation
    from kdrl_pl.module import KDRLModule


Metrics = dict[str, tuple[float, float]]  # name -> (sum, count)


def ask_ahead(module: KDRLModule, experience: Experience, rollout: int, metrics: Metrics) -> None:
    """The work of `KDRLModule.ask_ahead`: the teacher on every response token, where no reward decides about it."""
    distillation = _active_distillation(module, rollout)
    if distillation is not None and distillation.asks_about_all and module.reward_shaping is None:
        _ask(module, experience, experience.response_mask, rollout, metrics)


def fill_in(module: KDRLModule, experience: Experience, rollout: int, metrics: Metrics | None, is_asked: bool) -> None:
    """The work of `KDRLModule.score`, in its order: each line needs those before it."""
    phases.begin("score")
    started = time.perf_counter()
    module.student.eval()
    experience.share_prompts = _share_prompts(module, experience)
    updates = update_rows(experience.group, module.groups_per_update, world_size())
    if module.reward_shaping is not None or module.epochs_per_rollout * len(updates) > 1:
        experience.old_logprobs = module.student_logprobs(experience)
    asking = 0.0
    if experience.advantages is None:
        rewards = experience.rewards
        if module.reward_shaping is not None:
            asking, is_asked = _ask(module, experience, experience.response_mask, rollout, metrics), True
            rewards = _shaped_rewards(module, experience, rollout)
        experience.advantages = _advantages(module, experience, rewards)
    distillation, drop = _active_distillation(module, rollout), module.drop_groups_without_signal
    experience_weights(experience, updates, module.normaliser, distillation, all_reduce_sum, drop)
    if module.reference_kl is not None and module.reference_kl.coef.value(rollout) != 0.0:
        experience.reference_logprobs = module.student_logprobs(experience, module.reference.model)
    module.student.train()
    scored = time.perf_counter()
    if not is_asked:
        _ask(module, experience, _teacher_mask(module, experience, rollout), rollout, metrics)
    if metrics is not None:
        metrics["time/score"] = (scored - started - asking, 1)
        distilled = float((experience.kd_weights != 0).sum())
        metrics["teacher/kd_tokens"] = (distilled, float(experience.response_mask.sum()))


def _ask(module: KDRLModule, experience: Experience, asked: Tensor, rollout: int, metrics: Metrics | None) -> float:
    """The teacher's log-probs where `asked`, (B, T) bool, and zeros elsewhere; returns the seconds that it took."""
    phases.begin("teacher")
    started = time.perf_counter()
    experience.teacher_mask = asked
    is_asked = all_reduce_max(int(asked.any()), experience.device)  # a teacher may be cut over the ranks: all or none
    if is_asked:
        experience.stop_cell = module.stop_cell
        ask(module, experience, asked, hidden=module.objective.reads_teacher_vocabulary(rollout))
    else:
        experience.teacher_logprobs = torch.zeros(asked.shape, device=asked.device)
    give_way(experience.device)
    total, tokens = float(experience.teacher_logprobs.sum()), float(asked.sum())  # waits for a GPU
    seconds = time.perf_counter() - started
    if metrics is not None:
        metrics["time/teacher"], metrics["teacher/logprob"] = (seconds, 1), (total, tokens)
        if tokens:
            read = float(experience.attention_mask[asked.any(1)].sum())
            metrics["perf/teacher_tokens_per_s"] = (read, seconds)
        if is_asked:
            metrics.update(module.teacher.score_metrics)
    return seconds


def ask(module: KDRLModule, experience: Experience, asked: Tensor, hidden: bool = False) -> None:
    """`teacher.score`; where the teacher is lost, zeros, and the ranks stop at the `give_way` that must follow."""
    try:
        module.teacher.score(experience, asked, hidden=hidden)
    except TeacherLost as error:
        signals.give_up(str(error))
        experience.teacher_logprobs = torch.zeros(asked.shape, device=asked.device)


def _share_prompts(module: KDRLModule, experience: Experience) -> bool:
    """The same on every rank, so that all make the same forward passes."""
    pays = module.student.shares_prompts and sharing_pays(
        experience.prompt_lengths.tolist(),
        experience.response_lengths.tolist(),
        experience.group.tolist(),
        module.max_tokens_per_micro_batch,
    )
    return bool(all_reduce_max(int(pays), experience.device))


def _active_distillation(module: KDRLModule, rollout: int) -> Distillation | None:
    term = module.distillation
    return term if term is not None and term.coef.value(rollout) != 0.0 else None


def _teacher_mask(module: KDRLModule, experience: Experience, rollout: int) -> Tensor:
    """(B, T) bool, tokens the teacher is asked about: what the terms read, under the one mask of METHOD §3."""
    asked = module.objective.teacher_tokens(experience, rollout)
    return asked if module.distillation is None else asked & module.distillation.rows(experience)[:, None]


def _advantages(module: KDRLModule, experience: Experience, rewards: Tensor) -> Tensor:
    """(B,) float32; zero in pure distillation, which looks at no reward and may have groups of one."""
    masked = module.distillation is not None and module.distillation.mask == "negative_advantage"
    if not masked and not any(term.needs_advantages for term in module.objective.terms.values()):
        return torch.zeros_like(rewards)
    counted = ~experience.truncated if module.overlong_filter else None
    return group_advantages(rewards, experience.group, module.advantage_scale, module.advantage_eps, counted)


def _shaped_rewards(module: KDRLModule, experience: Experience, rollout: int) -> Tensor:
    """(B,) float32 with the teacher's part, once it has been asked about every response token."""
    ours = experience.old_logprobs
    if experience.stop_cell:
        ours = module.student_logprobs(experience, of_cells=True)
    return module.reward_shaping(
        experience.rewards, ours, experience.teacher_logprobs, experience.response_mask, rollout
    )
