"""Settings of an objective that do not go together: each refused with the cure."""

from __future__ import annotations

from collections.abc import Mapping

from kdrl_pl.advantages import SCALES
from kdrl_pl.losses import Distillation, Objective, PolicyGradient, ReferenceKL, RewardShaping
from kdrl_pl.losses.base import Term
from kdrl_pl.losses.weights import NORMALISERS
from kdrl_pl.losses.whole_update import WholeUpdate
from kdrl_pl.models.adapters import Lora
from kdrl_pl.teacher import BaseTeacher, FrozenTeacher

TAKEN = ("pg", "kd", "reward_shaping", "lr")  # names of the schedules that every run may have


def named_terms(
    policy_gradient: PolicyGradient | None, distillation: Distillation | None, terms: Mapping[str, Term | None] | None
) -> dict[str, Term]:
    """The terms of the objective by their names in the log; a null, which an overlay may set, takes one away.

    Raises:
        ValueError: a further term has a name that is taken.
    """
    taken = [name for name in terms or {} if name in TAKEN]
    _refuse(bool(taken), f"model.terms names a term {taken and taken[0]!r}, as a part of its own is; rename it")
    slots = {"pg": policy_gradient, "kd": distillation, **(terms or {})}
    return {name: term for name, term in slots.items() if term is not None}


def refuse_unsound(
    objective: Objective,
    *,
    teacher: FrozenTeacher | None,
    policy_gradient: PolicyGradient | None,
    distillation: Distillation | None,
    reward_shaping: RewardShaping | None,
    normaliser: str,
    advantage_scale: str,
    advantage_eps: float,
    epochs_per_rollout: int,
    groups_per_update: int | None,
    gradient_clip: float | None,
    max_tokens_per_micro_batch: int,
    max_skipped_steps: int,
    overlong_filter: bool,
    adapter: Lora | None,
) -> None:
    """Arguments as those of `KDRLModule`; the objective holds all of its terms.

    Raises:
        ValueError: the first setting that is wrong, or wrong beside another; the message says what to change.
    """
    _refuse(normaliser not in NORMALISERS, f"normaliser is {normaliser!r}; expected {', '.join(NORMALISERS)}")
    _refuse(advantage_scale not in SCALES, f"advantage_scale is {advantage_scale!r}; expected {', '.join(SCALES)}")
    for setting, value in (
        ("epochs_per_rollout", epochs_per_rollout),
        ("groups_per_update", groups_per_update),
        ("max_tokens_per_micro_batch", max_tokens_per_micro_batch),
        ("max_skipped_steps", max_skipped_steps),
    ):
        _refuse(value is not None and value < 1, f"model.{setting} is {value}; expected at least 1")
    _refuse(not 0 <= advantage_eps < 1, f"advantage_eps is {advantage_eps}; expected a small number such as 1e-6")
    _refuse(
        gradient_clip is not None and not gradient_clip > 0,
        f"gradient_clip is {gradient_clip}; expected a positive norm, or null for none",
    )
    _refuse(
        reward_shaping is not None and distillation is not None,
        "reward_shaping and distillation both bring in the teacher; set model.distillation: null for the ablation",
    )
    modulated = policy_gradient is not None and policy_gradient.modulation is not None
    _refuse(
        reward_shaping is not None and modulated,
        "reward_shaping and policy_gradient.modulation both put the teacher into the advantages; set one to null",
    )
    _refuse(
        teacher is None and (objective.needs_teacher or reward_shaping is not None),
        "distillation needs a teacher: set model.teacher.path, or model.distillation: null for plain GRPO "
        "(likewise model.reward_shaping and model.policy_gradient.modulation)",
    )
    _refuse(
        isinstance(teacher, BaseTeacher) and adapter is None,
        "BaseTeacher is the student without its adapter, and there is none; set model.adapter, or name the folder of "
        "the starting student: model.teacher: {class_path: kdrl_pl.teacher.FrozenTeacher, init_args: {path: FOLDER}}",
    )
    readers = [name for name, term in objective.terms.items() if term.reads_teacher_vocabulary]
    _refuse(
        bool(readers) and teacher is not None and teacher.whole_vocabulary is not None,
        f"{' and '.join(readers)} read the teacher's whole vocabulary: {teacher and teacher.whole_vocabulary}",
    )
    whole = [name for name, term in objective.terms.items() if isinstance(term, WholeUpdate)]
    _refuse(len(whole) > 1, f"{' and '.join(whole)} each look at all rows of an update; keep one of them")
    references = [term for term in objective.terms.values() if isinstance(term, ReferenceKL)]
    _refuse(len(references) > 1, f"{len(references)} terms are a ReferenceKL; there is one reference, keep one")
    only = policy_gradient.only_normaliser if policy_gradient is not None else None
    _refuse(
        only not in (None, normaliser),
        f"normaliser is {normaliser!r}, and {type(policy_gradient).__name__} adds up to its paper's objective only "
        f"under {only!r}; set model.normaliser: {only}",
    )
    _refuse(
        overlong_filter and distillation is not None and distillation.mask == "negative_advantage",
        "overlong_filter sets advantages of truncated responses to 0, which mask negative_advantage would take for "
        "a verdict; set model.distillation.mask: response, or model.overlong_filter: false",
    )


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ValueError(message)
