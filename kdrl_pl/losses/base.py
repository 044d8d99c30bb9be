"""How terms become a loss: each gives (B, T), the objective multiplies by coefficient and weights and sums, once.

    loss = sum over terms of coef(rollout) * sum over rows and tokens of weight * term

The weights hold the normaliser, computed over the global batch beforehand (losses/weights.py), so the sum does not
depend on how the rows are cut into micro-batches or spread over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Reader, Vocabulary
from kdrl_pl.losses.overlap import OVERLAP, top_k_overlap
from kdrl_pl.schedules import Schedule, as_schedule
from kdrl_pl.stop_cell import CELL, cell_logprobs, merged

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8: far outside every clip range, and its products stay finite in fp32

Sums = dict[str, tuple[Tensor, Tensor]]  # metric name -> (sum, count), tensors of shape ()


@dataclass
class PolicyOutput:
    """What the current student says of the rows, with gradient; zero outside the response mask.

    Args:
        logprobs: (B, T) float32 nats, of the sampled tokens.
        readings: name -> (B, T) float32, what terms read off the whole vocabulary (`Term.read`).
        importance: (B, T) weights of tokens that another engine sampled, filled in by the objective; None = all 1.
    """

    logprobs: Tensor
    readings: dict[str, Tensor] = field(default_factory=dict)
    importance: Tensor | None = None

    @property
    def cell_logprobs(self) -> Tensor:
        """(B, T) what stands beside the teacher's log-probs: `logprobs` but at stop tokens (kdrl_pl/stop_cell.py)."""
        return self.readings.get(CELL, self.logprobs)

    def reading(self, name: str) -> Tensor:
        """(B, T) what a term read; zeros where it was not called, since nobody had asked the teacher anything."""
        return self.readings[name] if name in self.readings else 0.0 * self.logprobs


@dataclass
class LossOutput:
    """The summed loss of some rows.

    Args:
        loss: shape (), to be back-propagated (times the data-parallel size where gradients are averaged over ranks).
        parts: term name -> its share of the loss, without gradient; like the loss they add up over micro-batches.
        metrics: name -> (sum, count) without gradient; added up over micro-batches and ranks, divided once at the end.
        logprobs: (B, T) float32 nats of the current student, without gradient.
    """

    loss: Tensor
    logprobs: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    metrics: Sums = field(default_factory=dict)


class Term:
    """One addend of the objective.

    Args:
        coef: its coefficient, a number or a schedule over rollouts.
    """

    needs_teacher = False
    needs_advantages = False
    reads_vocabulary = False  # `read` is called on the log-probs of every word
    reads_teacher_vocabulary = False  # the teacher's among them, where `teacher_tokens` asks
    sampled = True  # an average over sampled tokens, which the objective multiplies by `PolicyOutput.importance`

    def __init__(self, coef: Schedule | float) -> None:
        self.coef = as_schedule(coef)

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Tensor:
        """(B, T) per-token loss before coefficient and weights; finite outside the response mask."""
        raise TypeError(f"{type(self).__name__} does not define __call__")

    def weights(self, experience: Experience) -> Tensor:
        """(B, T) float32 weight of each token in the sum; zero where the term does not look."""
        raise TypeError(f"{type(self).__name__} does not define weights")

    def active(self, experience: Experience) -> Tensor:
        """(B,) bool, rows whose gradient this term can move at all; the others may be skipped."""
        return self.weights(experience).ne(0).any(1)

    def teacher_tokens(self, experience: Experience) -> Tensor:
        """(B, T) bool, tokens whose teacher log-probs the term reads; the teacher is asked about no others."""
        return torch.zeros_like(experience.response_mask)

    def read(self, vocabulary: Vocabulary) -> dict[str, Tensor]:
        """Name -> (N,) numbers of N positions, with gradient; the term finds them as `policy.readings[name]`, (B, T).

        Only while the log-probs of the whole vocabulary exist, a chunk of positions at a time. Positions that the
        teacher was not asked about hold nonsense, so the term must give them no weight. Where no position was asked,
        a reader of the teacher's vocabulary is not called and its names are missing. To such a reader the stop tokens
        are one word (kdrl_pl/stop_cell.py), to others they are what they are.
        """
        return {}

    def metrics(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Sums:
        """What the term wants logged, as sums and counts."""
        return {}


class Objective:
    """The weighted sum of named terms.

    Args:
        terms: name -> term; the name appears in the log as `train/<name>_loss` and `train/<name>_coef`.
        importance_cap: largest weight of a token that another engine sampled, see `importance`; None = no weights.

    Raises:
        ValueError: there is no term, or the cap is not positive.
    """

    def __init__(self, terms: Mapping[str, Term], importance_cap: float | None = None) -> None:
        if not terms:
            raise ValueError("the objective has no term; switch on model.policy_gradient or model.distillation")
        if importance_cap is not None and not importance_cap > 0:
            raise ValueError(f"importance_cap is {importance_cap}; expected a positive number such as 2, or null = off")
        self.terms = dict(terms)
        self.importance_cap = importance_cap

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> LossOutput:
        """The loss of these rows in this rollout, and its metrics."""
        loss = policy.logprobs.new_zeros(())
        parts: dict[str, Tensor] = {}
        metrics: Sums = {}
        if self.importance_cap is not None:
            correction = importance(policy, experience, self.importance_cap)  # (B, T)
            policy = replace(policy, importance=correction)
            metrics["train/importance_weight"] = (correction.sum(), experience.response_mask.sum().float())
        if OVERLAP in policy.readings and experience.teacher_mask is not None:
            asked = experience.teacher_mask & experience.response_mask
            metrics["teacher/top_k_overlap"] = (inside(policy.readings[OVERLAP], asked).sum(), asked.sum().float())
        for name, term in self.terms.items():
            coef = term.coef.value(rollout)
            value = loss.new_zeros(())
            if coef != 0.0:
                weights = term.weights(experience)  # (B, T)
                per_token = term(policy, experience, rollout)  # (B, T)
                if policy.importance is not None and term.sampled:
                    per_token = policy.importance * per_token
                value = coef * torch.where(weights != 0, weights * per_token, 0.0).sum()
                loss = loss + value
            parts[name] = value.detach()
            metrics.update(term.metrics(policy, experience, rollout))
        return LossOutput(loss, policy.logprobs.detach(), parts, metrics)

    def active(self, experience: Experience, rollout: int) -> Tensor:
        """(B,) bool, rows that some term with a coefficient other than 0 can move."""
        active = torch.zeros(len(experience), dtype=torch.bool, device=experience.device)
        for term in self.terms.values():
            if term.coef.value(rollout) != 0.0:
                active |= term.active(experience)
        return active

    def reader(self, rollout: int, with_teacher: bool, stops: Sequence[int] = ()) -> Reader | None:
        """What the terms with a coefficient other than 0 read off the vocabulary, as one function; None for nothing.

        Args:
            rollout: number of the rollout, for schedules.
            with_teacher: the teacher's vocabulary is at hand.
            stops: ids that are one cell wherever student and teacher are compared; empty for none.
        """
        active = [term for term in self.terms.values() if term.coef.value(rollout) != 0.0]
        alone = [term for term in active if term.reads_vocabulary and not term.reads_teacher_vocabulary]
        beside = [term for term in active if term.reads_teacher_vocabulary and with_teacher]
        if not (alone or beside or stops):
            return None

        def read(vocabulary: Vocabulary) -> dict[str, Tensor]:
            readings: dict[str, Tensor] = {}
            for term in alone:
                readings |= term.read(vocabulary)
            if stops:
                readings[CELL] = cell_logprobs(vocabulary, stops)
            if beside:
                cells = merged(vocabulary, stops) if stops else vocabulary
                readings[OVERLAP] = top_k_overlap(cells)
                for term in beside:
                    readings |= term.read(cells)
            return readings

        return read

    def reads_teacher_vocabulary(self, rollout: int) -> bool:
        """Whether a term with a coefficient other than 0 wants every word's log-prob of the teacher."""
        return any(t.reads_teacher_vocabulary and t.coef.value(rollout) != 0.0 for t in self.terms.values())

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for term in self.terms.values())

    def teacher_tokens(self, experience: Experience, rollout: int) -> Tensor:
        """(B, T) bool, tokens whose teacher log-probs some term with a coefficient other than 0 reads."""
        asked = torch.zeros_like(experience.response_mask)
        for term in self.terms.values():
            if term.coef.value(rollout) != 0.0:
                asked |= term.teacher_tokens(experience)
        return asked


def old_logprobs(logprobs: Tensor, experience: Experience) -> Tensor:
    """(B, T) log-probs before the first update; rows used for one update have none: then of the current student."""
    return logprobs.detach() if experience.old_logprobs is None else experience.old_logprobs


def log_ratio(policy: PolicyOutput, experience: Experience) -> Tensor:
    """(B, T) `logprobs - old`, clamped to +-20 nats, zero outside the response mask.

    With one update per rollout old is the current student, so that the ratio is 1 in value and its gradient alive.
    """
    difference = policy.logprobs - old_logprobs(policy.logprobs, experience)
    return inside(difference, experience.response_mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def cell_log_ratio(policy: PolicyOutput, experience: Experience) -> Tensor:
    """(B, T) the same with the gradient of `cell_logprobs`, for terms that hold the token beside the teacher's."""
    if CELL not in policy.readings:
        return log_ratio(policy, experience)
    cell = policy.cell_logprobs
    return log_ratio(PolicyOutput(policy.logprobs.detach() + (cell - cell.detach())), experience)


def importance(policy: PolicyOutput, experience: Experience, cap: float) -> Tensor:
    """(B, T) `min(exp(old - behavior), cap)`, detached, zero outside the response mask: truncated importance sampling.

    It corrects for rows that another engine sampled, whose policy is not quite the student's (METHOD §1, v).

    Raises:
        ValueError: the rows do not say what their sampler saw.
    """
    if experience.behavior_logprobs is None:
        raise ValueError(
            "importance_cap needs the log-probs of the sampler, and these rows have no behavior_logprobs; fill them "
            "in, or set model.importance_cap: null"
        )
    drift = old_logprobs(policy.logprobs, experience) - experience.behavior_logprobs
    mask = experience.response_mask
    return inside(inside(drift, mask).clamp(max=math.log(cap)).exp(), mask)


def inside(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask`, 0 elsewhere: selected, never multiplied, so that NaN or inf outside cannot leak in."""
    return torch.where(mask, values, 0.0)
