"""The gradients of a stored rollout, group by group, of every estimator under every mask.

Tokens were sampled by an earlier student: the ratio in the sampled forms is that of the current one over the sampler,
so that k2 estimates the gradient of the current student at the states the sampler visited (METHOD §1). Normalisers and
masks that depend on what was sampled leave it a bias of their own; "constant" and mask "none" do not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.losses.base import Objective, PolicyOutput, Term
from kdrl_pl.losses.distillation import ESTIMATORS, Distillation
from kdrl_pl.losses.weights import KD_MASKS, experience_weights
from kdrl_pl.replay.tables import Replayed, Sums
from kdrl_pl.schedules import as_schedule
from kdrl_pl.sequences import update_rows

if TYPE_CHECKING:
    from kdrl_pl.module import KDRLModule

OWN = "run"  # names the distillation term as the run has it: its bound, mask, gate


@dataclass(frozen=True)
class Variant:
    """One way to distil, at coefficient 1.

    Args:
        estimator: its name in the table.
        mask: likewise.
        term: gives the loss per token.
        kept: gives the weights: mask, gate and normaliser.
    """

    estimator: str
    mask: str
    term: Distillation
    kept: Distillation


EXACT = Distillation(1.0, "full")  # what every variant is compared with, under its own weights


def all_variants(
    own: Distillation, estimators: Sequence[str] = ESTIMATORS, masks: Sequence[str] = KD_MASKS
) -> list[Variant]:
    """Every estimator under every mask, without bound and gate, and the run's own term.

    Args:
        own: the distillation of the run; its normaliser and K are everybody's.
        estimators: names out of `ESTIMATORS`.
        masks: names out of `KD_MASKS`.
    """
    terms = {name: EXACT if name == "full" else Distillation(1.0, name, top_k=own.top_k) for name in estimators}
    rows = {name: Distillation(1.0, mask=name, normaliser=own.normaliser) for name in masks}
    found = [Variant(estimator, mask, terms[estimator], rows[mask]) for mask in masks for estimator in estimators]
    unit = copy.copy(own)
    unit.coef = as_schedule(1.0)
    return [*found, Variant(OWN, OWN, unit, own)]


def replay(module: KDRLModule, experience: Experience, rollout: int, variants: Sequence[Variant]) -> Replayed:
    """The gradients of a stored rollout, group by group, at the module's student.

    Memory holds two vectors of the size of the weights per variant, on the CPU.

    Args:
        module: loaded, with student and teacher, in one process.
        experience: rows with rewards, whole groups; scored anew, in place.
        rollout: its number, for the coefficient of the policy gradient.
        variants: from `all_variants`.
    """
    module.score(experience, rollout)
    if experience.behavior_logprobs is not None:
        experience.old_logprobs = experience.behavior_logprobs
    experience.share_prompts = False
    weights = _weights(module, experience, variants)
    zero = torch.zeros(sum(w.numel() for w in _trained(module)), dtype=_trained(module)[0].dtype)
    found = Replayed(Sums(zero.clone()))
    for key in weights:
        found.of[key], found.exact[key] = Sums(zero.clone()), zero.clone()
    for group in experience.group.unique_consecutive().tolist():
        rows = (experience.group == group).nonzero().flatten()
        part = experience[rows]
        module.teacher.score(part, part.response_mask, hidden=True)
        rl, rl_loss = zero, 0.0
        of = dict.fromkeys(weights, (zero, 0.0))
        exact = dict.fromkeys(weights, zero)
        for index in module.micro_batch_rows(part):
            block = _Block(module, part[index], [variant.term for variant in variants], rollout)
            width = block.rows.input_ids.shape[1]
            gradient, loss = block.gradient(module.objective.terms.get("pg"))
            rl, rl_loss = rl + gradient, rl_loss + loss
            for variant in variants:
                key = (variant.estimator, variant.mask)
                kept = weights[key][rows[index], :width]
                gradient, loss = block.gradient(variant.term, kept)
                of[key] = (of[key][0] + gradient, of[key][1] + loss)
                exact[key] = exact[key] + block.gradient(EXACT, kept)[0]
        found.groups += 1
        found.rl.add(rl, rl_loss, rl, rl)
        for key, (gradient, loss) in of.items():
            found.of[key].add(gradient, loss, rl, exact[key])
            found.exact[key] += exact[key]
    return found


def _weights(module: KDRLModule, experience: Experience, variants: Sequence[Variant]) -> dict[tuple[str, str], Tensor]:
    """(estimator, mask) -> (B, T) weights of the distillation term, normalised as the run does."""
    updates = update_rows(experience.group, module.groups_per_update)
    token_weights, weights = experience.token_weights, {}
    for variant in variants:
        experience_weights(experience, updates, module.normaliser, variant.kept, lambda total: total)
        weights[variant.estimator, variant.mask] = experience.kd_weights
    experience.token_weights = token_weights
    return weights


class _Block:
    """One micro-batch of a group: one forward pass, back through which every variant goes.

    Args:
        module: student and teacher.
        rows: scored, with the teacher's hidden states.
        terms: the distillation terms that will be asked for, beside `EXACT`.
        rollout: number of the rollout.
    """

    def __init__(self, module: KDRLModule, rows: Experience, terms: Sequence[Distillation], rollout: int) -> None:
        self.rows, self.rollout, self.weights = rows, rollout, _trained(module)
        self.objectives = {id(term): Objective({"kd": term}) for term in (EXACT, *terms)}
        readers = {number: o.reader(rollout, True, rows.stop_cell) for number, o in self.objectives.items()}

        def read(vocabulary: Vocabulary) -> dict[str, Tensor]:
            """What every term reads, in one pass; each under its own name."""
            found: dict[str, Tensor] = {}
            for number, reader in readers.items():
                if reader is not None:
                    found |= {f"{number}/{name}": value for name, value in reader(vocabulary).items()}
            return found

        scores = module.student.token_logprobs(
            rows.input_ids,
            rows.response_mask,
            rows.temperature,
            read=read,
            teacher_hidden=rows.teacher_hidden,
            teacher_head=module.teacher.head(),
        )
        self.logprobs, self.readings = scores.logprobs, scores.readings
        self._made: dict[tuple, tuple[Tensor, float]] = {}

    def gradient(self, term: Term | None, kept: Tensor | None = None) -> tuple[Tensor, float]:
        """(W,) gradient of the term in the trained weights, on the CPU, and its loss; zeros where it does not act.

        Args:
            term: with its coefficient; None is no term.
            kept: (B, T) weights of a distillation term.
        """
        silent = term is None or term.coef.value(self.rollout) == 0.0
        if silent or (kept is not None and not bool((kept != 0).any())):
            return torch.zeros(sum(w.numel() for w in self.weights), dtype=self.weights[0].dtype), 0.0
        key = (id(term), None if kept is None else tuple(kept.sum(1).tolist()))  # masks often keep the same rows
        if key not in self._made:
            if kept is not None:
                self.rows.kd_weights = kept
            own = {k.partition("/")[2]: v for k, v in self.readings.items() if k.startswith(f"{id(term)}/")}
            objective = self.objectives.get(id(term)) or Objective({"pg": term})
            loss = objective(PolicyOutput(self.logprobs, own), self.rows, self.rollout).loss
            parts = torch.autograd.grad(loss, self.weights, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(w) if g is None else g for g, w in zip(parts, self.weights, strict=True)]
            self._made[key] = (torch.cat([g.flatten() for g in flat]).cpu(), float(loss.detach()))
        return self._made[key]


def _trained(module: KDRLModule) -> list[Tensor]:
    return [weight for weight in module.student.parameters() if weight.requires_grad]
