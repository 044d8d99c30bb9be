"""What a checkpoint holds of a `KDRLModule` beside weights and optimizer, and how a run goes on from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdrl_pl.identity import check_same
from kdrl_pl.models.adapter_files import adapter_state, name_of_base
from kdrl_pl.models.adapters import adapter_weights
from kdrl_pl.models.loading import tokenizer_fingerprint

if TYPE_CHECKING:
    from kdrl_pl.module import KDRLModule


def state_of(module: KDRLModule) -> dict[str, Any]:
    """Plain numbers, strings and tensors: checkpoints load with `weights_only=True`."""
    adapter = module.adapter
    return {
        "rollouts_done": module.rollouts_done,
        "skipped_steps": module.skipped_steps,
        "skipped_in_a_row": module.skipped_in_a_row,
        "sampled_tokens": module.sampled_tokens,
        "schedules": {name: schedule.state_dict() for name, schedule in module.schedules().items()},
        "reference": None if module.reference is None else module.reference.state_dict(),
        "teacher": module.teacher.fingerprint() if module.needs_teacher else None,
        "tokenizer": tokenizer_fingerprint(module.student_path),
        "adapter": adapter and adapter_state(adapter, module.student_path, module.dtype_name),
    }


def base_of(module: KDRLModule) -> str:
    """Names the weights that an adapter is trained on."""
    return name_of_base(module.adapter, module.student_path, module.dtype_name)


def check_adapter(module: KDRLModule, checkpoint: dict[str, Any]) -> None:
    """Refuse weights that are not those of this run's adapter on its base; without it they would be put on any.

    Raises:
        ValueError: what differs; or it is no checkpoint of this module.
    """
    if "kdrl" not in checkpoint:
        raise ValueError(
            "the checkpoint was not written by kdrl fit; one of kdrl sft becomes a student by kdrl export RUN: set "
            "model.student to the folder that it writes"
        )
    state, ours = checkpoint["kdrl"]["adapter"], module.adapter
    if (state is None) != (ours is None):
        has, lacks = ("the whole student", "is set") if state is None else ("an adapter only", "is null")
        raise ValueError(f"the checkpoint holds {has}, and model.adapter {lacks}; set model.adapter as the run had it")
    if ours is None:
        return
    cure = "use the same model.student, model.dtype and model.adapter.quantization, or start a new run"
    check_same("on base", state["base"], base_of(module), cure, module.resume_anyway)
    for name, value in ours.settings().items():
        if state[name] != value:
            raise ValueError(
                f"the checkpoint holds an adapter with {name} {state[name]}, and model.adapter.{name} is {value}; set "
                "it as the run had it, or start a new run from the exported student"
            )
    if checkpoint["state_dict"].keys() != adapter_weights(module).keys():
        raise ValueError("the layers of the checkpoint's adapter are not those of this student; use its own base")


def restore(module: KDRLModule, state: dict[str, Any]) -> None:
    """Go on where the checkpoint stands.

    Raises:
        ValueError: it was trained with another tokenizer or under another teacher, and `resume_anyway` is not set.
    """
    module.rollouts_done, module.sampled_tokens = state["rollouts_done"], state["sampled_tokens"]
    module.skipped_steps, module.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
    for name, schedule in module.schedules().items():
        learnt = state["schedules"].get(name, {})
        if learnt.keys() == schedule.state_dict().keys():  # else another kind was put in its place: it starts anew
            schedule.load_state_dict(learnt)
    if module.trainer.state.fn != "fit":
        return
    if module.reference is not None:
        module.reference.load_state_dict(state["reference"])
    tokenizer = tokenizer_fingerprint(module.student_path)
    cure = "use the same model.student, or start a new run"
    check_same("with tokenizer", state["tokenizer"], tokenizer, cure, module.resume_anyway)
    teacher = module.teacher.fingerprint() if module.needs_teacher else None
    cure = "use the same teacher (path and precision), or start a new run from the exported student"
    check_same("under teacher", state["teacher"], teacher, cure, module.resume_anyway)
