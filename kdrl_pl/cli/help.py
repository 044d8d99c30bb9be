"""The short help of the commands that train and evaluate: what people change most. It imports nothing heavy.

All settings are what `--help-all` lists, from the constructors' own words; a test holds the defaults named here against
them.
"""

from __future__ import annotations

# option -> (what it does, default; None = it has none)
SETTINGS: dict[str, tuple[str, str | None]] = {
    "--config FILE": ("settings in YAML; several are laid over each other, options win over all of them", None),
    "--model.student PATH": ("the model that is trained: a Hugging Face folder or hub name", None),
    "--model.teacher.path PATH": ("the frozen teacher, of the student's model family", None),
    "--model.distillation.coef X": ("beta, the teacher's weight; the paper's best falls from 5e-3 to 1e-3", "0.002"),
    "--model.optimizer.init_args.lr X": ("learning rate", None),
    "--data.prompts_per_rollout N": ("prompts of one rollout, over all ranks", "128"),
    "--rollout.group_size N": ("responses to each prompt", "8"),
    "--rollout.sampling.max_tokens N": ("length of a response at most", "8192"),
    "--model.max_tokens_per_micro_batch N": ("less memory with less; the result stays the same", "8192"),
    "--run.name NAME": ("the run's folder is runs/NAME/<time>", "kdrl"),
    "--run.max_rollouts N": ("rollouts of the whole run", "null"),
    "--trainer.val_check_interval N": ("rollouts between two validations", "20"),
    "--view.kind KIND": ("auto, rich, plain or quiet: what is shown meanwhile", "auto"),
}
_SWITCHES = {
    "fit": {
        "--dry-run": "read settings and data and say what would run; nothing is written",
        "--resume auto|must|never|PATH": "go on with the newest run of that name, or with PATH",
        "--resume-anyway": "also with another teacher, tokenizer or data set",
    },
    "validate": {"--ckpt_path PATH": "weights of a run folder or checkpoint instead of model.student"},
    "test": {"--ckpt_path PATH": "weights of a run folder or checkpoint instead of model.student"},
    "predict": {"--output FILE": "JSONL file to write (predictions.jsonl)"},
}
_COMMON = {
    "--allow-import NAME": "let the config name functions and classes of your module",
    "--print_config": "show every setting of this run with its value, and end",
    "--help-all": "every setting there is, and what it does",
}
_EXAMPLES = {
    "fit": """\
  kdrl fit --config configs/quickstart.yaml
  kdrl fit --config configs/quickstart.yaml --config configs/arms/grpo.yaml --run.name grpo
  kdrl fit --config configs/kdrl.yaml --config configs/trainer/gpu.yaml --model.student PATH --dry-run
  kdrl fit --resume runs/quickstart/2026-01-31_12-00-00 --run.max_rollouts 200""",
    "validate": """\
  kdrl validate --config configs/quickstart.yaml --ckpt_path runs/quickstart/2026-01-31_12-00-00
  kdrl validate --config configs/quickstart.yaml --rollout.policy teacher""",
    "test": """\
  kdrl test --config configs/quickstart.yaml --model.student checkpoints/quickstart""",
    "predict": """\
  kdrl predict --config configs/quickstart.yaml --rollout.policy teacher --output teacher.jsonl""",
}
_TRAINING = ("--model.optimizer", "--model.distillation", "--model.max", "--run.", "--trainer.val", "--data.prompts")


def short_help(command: str) -> str | None:
    """The help of `kdrl COMMAND --help`; None for a command whose own help is short.

    >>> short_help("export") is None
    True
    """
    if command not in _EXAMPLES:
        return None
    settings = {
        option: text + (f" ({default})" if default is not None else "")
        for option, (text, default) in SETTINGS.items()
        if command == "fit" or not option.startswith(_TRAINING)
    }
    rows = {**settings, **_SWITCHES[command], **_COMMON}
    width = max(map(len, rows))
    lines = [f"usage: kdrl {command} [--config FILE ...] [--SECTION.KEY VALUE ...]", ""]
    for title, part in (("settings most often changed (default)", settings), ("switches", rows)):
        lines += [f"{title}:"]
        lines += [f"  {o:<{width}}  {text}" for o, text in part.items() if part is settings or o not in settings]
        lines += [""]
    return "\n".join([*lines, "examples:", _EXAMPLES[command], ""])
