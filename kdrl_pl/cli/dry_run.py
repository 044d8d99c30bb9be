"""`kdrl fit --dry-run`: everything but training. Settings, tokenizers and data are read; nothing is made or loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdrl_pl.doctor.texts import teacher_paths
from kdrl_pl.models.loading import check_model_path, load_tokenizer
from kdrl_pl.schedules import Schedule
from kdrl_pl.teacher.frozen import check_same_tokenizer
from kdrl_pl.text import printable
from kdrl_pl.view.completions import one_line

if TYPE_CHECKING:
    from kdrl_pl.cli.lightning import RunCLI
    from kdrl_pl.data.datamodule import PromptDataModule
    from kdrl_pl.module import KDRLModule
    from kdrl_pl.rewards.guard import GuardedReward

_TERMS = {"pg": "reinforcement learning", "kd": "distillation"}
_ESTIMATORS = {
    "k2": "reverse KL, sampled (k2)",
    "full": "reverse KL over the whole vocabulary",
    "top_k": "reverse KL over the student's likeliest words, sampled beyond them",
    "forward_kl": "forward KL, sampled",
}
_MASKS = {"response": "wrong responses only", "group": "groups without a right response only"}


def dry_run(cli: RunCLI) -> None:
    """Print what the run would do.

    Raises:
        ValueError: what the run itself would raise before its first rollout, as far as no weights are needed for it.
    """
    lines = list(description(cli))
    width = max(len(head) for head, _ in lines)
    print("this run, without running it (nothing was written):")
    for head, text in lines:
        print(printable(f"  {head:<{width}}  {text}"))


def description(cli: RunCLI) -> Iterator[tuple[str, str]]:
    """(what, in words) of everything that a person checks before a long run."""
    module: Any = cli.model
    data, trainer = attach(cli), cli.trainer
    rollouts, run = find(cli, "group_size"), find(cli, "max_rollouts")
    yield "student", f"{module.student_path}, {_size(module.student_path)}, {module.dtype_name}"
    yield "teacher", _teacher(module, data)
    total = run.max_rollouts
    yield from _objective(module, total)
    data.setup("fit")
    if module.distillation is not None and module.distillation.competence is not None:
        module.distillation.competence.check(p for prompts in data.rows["train"].values() for p in prompts)
    if module.teacher is not None:
        train = (prompt for prompts in data.rows["train"].values() for prompt in prompts)
        module.teacher.check_names((prompt.uid, prompt.teacher) for prompt in train)
    for section, sets in data.rows.items():
        yield section, "; ".join(f"{name}, {len(prompts):,} prompts" for name, prompts in sets.items()) or "none"
    prompts = [prompt for sets in data.rows["train"].values() for prompt in sets]
    longest = max(len(prompt.input_ids) for prompt in prompts)
    yield "a prompt", f"{one_line(prompts[0].text, 160)!r} (the longest has {longest} tokens)"
    yield "reward", _reward(rollouts.reward)
    rows, budget = data.prompts_per_rollout * rollouts.group_size, rollouts.sampling.max_tokens
    many = f"{total} rollouts" if total else "rollouts until trainer.max_epochs"
    yield (
        "sampling",
        f"{many} of {data.prompts_per_rollout} prompts x {rollouts.group_size} responses = {rows:,} rows of at most "
        f"{budget:,} tokens ({rows * budget:,} tokens a rollout at most)",
    )
    yield "updates", _updates(module, data, total, cli)
    yield "validation", _validation(data, rollouts, trainer)
    devices = f"{trainer.world_size} x {type(trainer.accelerator).__name__.removesuffix('Accelerator')}"
    yield "devices", f"{devices}, {type(trainer.strategy).__name__}, precision {trainer.precision}"
    yield "run folder", f"{cli.folder}{f', going on from {cli.checkpoint}' if cli.checkpoint else ' (new)'}"
    yield "memory", "kdrl estimate, with the same arguments, says what it needs"


def attach(cli: RunCLI) -> PromptDataModule:
    """The data module as the Trainer would find it, knowing student and ranks."""
    data: Any = cli.datamodule
    cli.trainer.strategy.connect(cli.model)
    data.trainer = cli.trainer
    return data


def find(cli: RunCLI, attribute: str) -> Any:
    """The callback that has this attribute."""
    trainer: Any = cli.trainer
    return next(callback for callback in trainer.callbacks if hasattr(callback, attribute))


def _size(path: str) -> str:
    """Number of parameters, counted without their values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(check_model_path(path), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    number = float(sum(parameter.numel() for parameter in model.parameters()))
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter} parameters"
    return f"{number:.0f} parameters"


def _teacher(module: KDRLModule, data: PromptDataModule) -> str:
    teacher: Any = module.teacher
    if teacher is None or not (module.needs_teacher or module.evaluate_kl):
        return "none"
    words = []
    for path in teacher_paths(teacher):
        check_same_tokenizer(data.tokenizer, load_tokenizer(path), path)
        words.append(f"{path}, {_size(path)}, same tokenizer")
    kind = type(teacher).__name__
    if kind != "FrozenTeacher":
        words.insert(0, f"{kind} {getattr(teacher, 'url', '')}".strip())
    else:
        words.append(teacher.quantization or teacher.dtype)
    if not module.needs_teacher:
        words.append("no term reads it, so it is not loaded")
    return ", ".join(words)


def _objective(module: KDRLModule, total: int | None) -> Iterator[tuple[str, str]]:
    """One line per term, in words."""
    for name, term in module.objective.terms.items():
        words = [_TERMS.get(name, type(term).__name__), f"coefficient {_course(term.coef, total)}"]
        if name == "kd":
            distillation = module.distillation
            words.append(_ESTIMATORS[distillation.estimator])
            if distillation.mask != "none":
                words.append(_MASKS.get(distillation.mask, distillation.mask))
            if distillation.rows_without_signal < 1:
                words.append(f"{distillation.rows_without_signal:.3g} of the rows of groups without signal")
        if (modulation := getattr(term, "modulation", None)) is not None:
            words.append(f"changed by the teacher ({type(modulation).__name__})")
        yield "term", ", ".join(words)
    if module.reward_shaping is not None:
        yield "term", f"the teacher inside the reward, coefficient {_course(module.reward_shaping.coef, total)}"
    yield "normaliser", f"{module.normaliser}; advantages scaled by {module.advantage_scale}"


def _reward(guarded: GuardedReward) -> str:
    """Its name, once it is sure that it can begin: a function of the user's may be missing, or not allowed."""
    guarded.setup()
    guarded.close()
    function = getattr(guarded.reward, "function", "")
    return f"{type(guarded.reward).__name__} {function if isinstance(function, str) else ''}".rstrip()


def _course(schedule: Schedule, total: int | None) -> str:
    """A coefficient over the run: at its beginning, middle and end, where these differ."""
    last = (total or 2) - 1
    values = [f"{schedule.value(rollout):.3g}" for rollout in (0, last // 2, last)]
    if len(set(values)) == 1:
        return values[0] + (" until the run decides otherwise" if schedule.state_dict() else "")
    return " → ".join(values)


def _updates(module: KDRLModule, data: PromptDataModule, total: int | None, cli: RunCLI) -> str:
    groups = module.groups_per_update or data.prompts_per_rollout
    if data.prompts_per_rollout % groups:
        raise ValueError(
            f"model.groups_per_update is {groups} with {data.prompts_per_rollout} prompts per rollout; expected a "
            "divisor of it"
        )
    each = data.prompts_per_rollout // groups * module.epochs_per_rollout
    settings: Any = cli.config[cli.subcommand]["model"]["optimizer"]
    optimizer, rate = "the default optimizer", None
    if settings is not None and hasattr(settings, "class_path"):
        optimizer, rate = settings.class_path.rpartition(".")[2], getattr(settings.init_args, "lr", None)
    in_all = f", {each * total:,} in all" if total else ""
    speed = f", learning rate {rate:g} x {_course(module.lr_schedule, total)}" if rate is not None else ""
    return f"{each} a rollout{in_all}; {optimizer}{speed}"


def _validation(data: PromptDataModule, rollouts: Any, trainer: Any) -> str:
    number = sum(len(prompts) for prompts in data.rows.get("val", {}).values())
    if not number:
        return "none: no set under data.val"
    when = f"before training, every {trainer.val_check_interval} rollouts and at the end"
    return f"{number:,} prompts x {rollouts.validation_samples} responses, {when}"
