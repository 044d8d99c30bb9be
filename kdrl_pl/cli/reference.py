"""Every setting there is, as docs/reference.md: names, types, defaults and the constructors' own words.

    python -m kdrl_pl.cli.reference > docs/reference.md

A test compares the two.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

_INTRO = """\
# Configuration reference

Every setting of a run, printed by `python -m kdrl_pl.cli.reference` from the constructors themselves; a test keeps page
and code equal. A complete file with comments is `configs/kdrl.yaml`; `kdrl fit --config FILE --print_config` shows what
a run really has.

A setting is written in YAML (`model:`, below it `student:`) or on the command line (`--model.student PATH`), which
wins. Files are laid over each other key by key, the later one on top. Where a setting takes an object of several
classes, name the class and give its arguments:

```yaml
rollout:
  reward:
    class_path: kdrl_pl.rewards.NumericMatch
    init_args: {boxed: true}
```

A class path may name `kdrl_pl`, `torch.optim`, `bitsandbytes.optim` and `lightning.pytorch`, and modules of your own
after `--allow-import NAME`. Where only one class fits, its arguments stand there directly
(`model.distillation.coef`). `required` means that there is no default, `null` switches off.
"""
_OPTIMIZERS = """\
Any optimizer class, its `lr` and other arguments as its own documentation has them; the weights are put in for you.
Without one it is `torch.optim.AdamW` with lr 1e-6 and no weight decay. 8-bit ones: [adapters](adapters.md).

```yaml
model:
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {lr: 1.0e-6, betas: [0.9, 0.999], weight_decay: 0.0}
```
"""
_TRAINER = """\
Everything that Lightning's `Trainer` takes, by its own names: `accelerator`, `devices`, `num_nodes`, `strategy`
(`auto`, `ddp`, `fsdp2`), `precision` (`32-true` or `bf16-mixed`), `logger` ([loggers](ecosystem.md#loggers)),
`callbacks`, `limit_val_batches` and so on. One training batch is one rollout, so `val_check_interval` counts rollouts.
Other defaults than Lightning's:
"""
_REFUSALS = "Refused, because unsound here:"
_SWITCHES = """\
## The command line

| switch | of | meaning |
|---|---|---|
| `--config FILE` | all | settings in YAML; may be given several times, later ones on top |
| `--print_config` | all | print every setting of this run, and end |
| `--allow-import NAME` | all | a class path or a reward function may name your module |
| `--dry-run` | `fit` | read settings and data and say what would run |
| `--resume auto\\|must\\|never\\|PATH` | `fit` | the newest run of that name, or a run folder or checkpoint |
| `--resume-anyway` | `fit` | also with another teacher, tokenizer or data set |
| `--ckpt_path PATH` | `validate`, `test` | weights of a run folder or checkpoint in place of `model.student` |
| `--output FILE` | `predict` | the JSON Lines file to write |
| `--seed_everything N` | all | seed of whatever has none of its own; rollouts and data have theirs |

The other commands say what they take: `kdrl COMMAND --help`.
"""


def sections() -> Iterator[tuple[int, str, str, Any]]:
    """(heading level, title, text, class) in the order of the page; a class of None is text alone."""
    from kdrl_pl.checkpoint import Checkpoints
    from kdrl_pl.cli.sft import SFTRun
    from kdrl_pl.data.curriculum import Curriculum
    from kdrl_pl.data.datamodule import PromptDataModule
    from kdrl_pl.data.examples import SFTSetConfig
    from kdrl_pl.data.loading import SetConfig
    from kdrl_pl.data.sft import SFTDataModule
    from kdrl_pl.data.tasks import TASKS
    from kdrl_pl.data.template import FewShot, Template
    from kdrl_pl.listening import KLBudget, PlateauSwitch
    from kdrl_pl.losses import (
        GSPO,
        IBRO,
        TGPO,
        DisCO,
        Distillation,
        PolicyGradient,
        ReferenceKL,
        RewardShaping,
    )
    from kdrl_pl.losses.competence import Competence
    from kdrl_pl.losses.modulation import RLSD, TRRD, DistilledRL
    from kdrl_pl.models.adapters import Lora
    from kdrl_pl.module import KDRLModule
    from kdrl_pl.progress import Progress
    from kdrl_pl.rewards import (
        ExactMatch,
        FunctionReward,
        GuardedReward,
        MathReward,
        NumericMatch,
        SoftOverlong,
        TaskReward,
        ThinkAnswerFormat,
        TRLReward,
        WeightedSum,
    )
    from kdrl_pl.rollout.callback import RolloutCallback
    from kdrl_pl.rollout.in_process import InProcessEngine
    from kdrl_pl.rollout.sampling import Sampling
    from kdrl_pl.rollout.vllm_engine import VLLMEngine
    from kdrl_pl.rollout.vllm_server import VLLMServerEngine
    from kdrl_pl.run_folder import RunFolder
    from kdrl_pl.schedules import Constant, Cosine, Linear, Switch, Warmup
    from kdrl_pl.sft import SFTModule
    from kdrl_pl.teacher import BaseTeacher, FrozenTeacher, RemoteTeacher, RoutedTeacher, TeacherCache, VLLMTeacher

    yield 2, "`model`", "", KDRLModule
    yield (
        3,
        "`model.teacher`",
        "By class_path; without one it is a `FrozenTeacher`. More: [teachers](teachers.md).",
        None,
    )
    yield from _choices("kdrl_pl.teacher", FrozenTeacher, BaseTeacher, RoutedTeacher, RemoteTeacher, VLLMTeacher)
    yield 4, "`model.teacher.cache`", "", TeacherCache
    yield 3, "`model.adapter`", "", Lora
    yield 3, "`model.policy_gradient`", "By class_path; without one it is a `PolicyGradient`.", None
    yield from _choices("kdrl_pl.losses", PolicyGradient, GSPO)
    yield 4, "`model.policy_gradient.modulation`", "By class_path; null is none.", None
    yield from _choices("kdrl_pl.losses.modulation", TRRD, DistilledRL, RLSD)
    yield 3, "`model.distillation`", "", Distillation
    yield 4, "`model.distillation.competence`", "", Competence
    yield 3, "`model.reward_shaping`", "", RewardShaping
    yield 3, "`model.terms.NAME`", "Further terms, each under a name of your choice, by class_path.", None
    yield from _choices("kdrl_pl.losses", DisCO, ReferenceKL, TGPO, IBRO)
    yield 3, "Schedules", "For every `coef` and for `model.lr_schedule`: a number, or one of these by class_path.", None
    yield from _choices("kdrl_pl.schedules", Constant, Linear, Cosine, Switch, Warmup)
    yield from _choices("kdrl_pl.listening", PlateauSwitch, KLBudget)
    yield 3, "`model.optimizer`", _OPTIMIZERS, None
    yield 2, "`data`", "", PromptDataModule
    yield 3, "`data.train.NAME`", "And `data.val.NAME`, `data.test.NAME`, `data.predict.NAME`.", SetConfig
    yield 3, "`data.template`", "", Template
    yield 4, "`data.template.few_shot`", "", FewShot
    yield 3, "`data.curriculum`", "By class_path: `kdrl_pl.data.curriculum.Curriculum`.", Curriculum
    yield 3, "Procedural tasks", "`source: NAME`, and `options:` with these keys.", None
    for name, task in TASKS.items():
        yield 4, f"`{name}`", "", task.generate
    yield (
        4,
        "`reasoning_gym:TASK`",
        "The options of that task in reasoning-gym (`pip install 'kdrl_pl[reasoning-gym]'`).",
        None,
    )
    yield 2, "`rollout`", "", RolloutCallback
    yield 3, "`rollout.sampling`", "And `rollout.validation_sampling`.", Sampling
    yield 3, "`rollout.reward`", "By class_path.", None
    yield from _choices("kdrl_pl.rewards", FunctionReward, TRLReward, ExactMatch, NumericMatch, MathReward)
    yield from _choices("kdrl_pl.rewards", TaskReward, ThinkAnswerFormat, SoftOverlong, WeightedSum, GuardedReward)
    yield 3, "`rollout.engine`", "By class_path; null is the `InProcessEngine`. More: [vLLM](vllm.md).", None
    yield from _choices("kdrl_pl.rollout.in_process", InProcessEngine)
    yield from _choices("kdrl_pl.rollout.vllm_engine", VLLMEngine)
    yield from _choices("kdrl_pl.rollout.vllm_server", VLLMServerEngine)
    yield 2, "`trainer`", _trainer(), None
    yield 2, "`run`", "", RunFolder
    yield 2, "`checkpoint`", "", Checkpoints
    yield 2, "`view`", "", Progress
    yield 2, "`kdrl sft`", "Sections `model`, `data`, `run`, and `trainer` and `checkpoint` as above.", None
    yield 3, "`model` of sft", "", SFTModule
    yield 3, "`data` of sft", "", SFTDataModule
    yield 4, "`data.train.NAME` of sft", "", SFTSetConfig
    yield 3, "`run` of sft", "", SFTRun


def _choices(package: str, *classes: type) -> Iterator[tuple[int, str, str, Any]]:
    for choice in classes:
        yield 5, f"`{package}.{choice.__name__}`", "", choice


def _trainer() -> str:
    from kdrl_pl.cli.lightning import _REFUSED, TRAINER_DEFAULTS

    defaults = [f"| `{name}` | {_plain(value)} |" for name, value in TRAINER_DEFAULTS.items()]
    refused = [
        f"| `{name}` | {'leave it alone' if value is None else _plain(value)} | {cure} |"
        for name, (value, cure) in _REFUSED.items()
    ]
    return "\n".join(
        [
            _TRAINER,
            *("| name | default |", "|---|---|", *defaults, "", _REFUSALS, ""),
            *("| name | only sound value | why, or what to use |", "|---|---|---|", *refused, ""),
        ]
    )


def markdown() -> str:
    """The whole page."""
    parts = [_INTRO]
    for level, title, text, of in sections():
        parts.append(f"{'#' * level} {title}\n")
        if of is not None:
            parts.append(f"{_summary(of)}\n")
        if text:
            parts.append(text if text.endswith("\n") else f"{text}\n")
        if of is not None and (rows := list(_rows(of))):
            parts.append("\n".join(["| name | type | default | meaning |", "|---|---|---|---|", *rows, ""]))
    return "\n".join([*parts, _SWITCHES])


def _rows(of: Any) -> Iterator[str]:
    """One line of a table per argument.

    Raises:
        ValueError: an argument is not documented.
    """
    words = _arguments(of)
    for name, parameter in inspect.signature(of).parameters.items():
        if name == "rng":  # of a task: not for the user
            continue
        if name not in words:
            raise ValueError(f"{of.__qualname__} does not document its argument {name}")
        cells = [f"`{name}`", _type(parameter.annotation), _default(of, parameter), words[name]]
        yield f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text for a table: no bar ends the cell, and nothing outside code reads as HTML."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def _docstrings(of: Any) -> list[str]:
    """Its own and those of the classes it derives from."""
    owners: Sequence[Any] = of.__mro__[:-1] if isinstance(of, type) else [of]
    return [inspect.cleandoc(owner.__doc__) for owner in owners if owner.__doc__ and "kdrl_pl" in owner.__module__]


def _summary(of: Any) -> str:
    """What stands before `Args:`, as one text."""
    return re.split(r"\n(?:Args|Raises|Returns):", _docstrings(of)[0])[0].strip()


def _arguments(of: Any) -> dict[str, str]:
    """argument -> what it means."""
    words: dict[str, str] = {}
    for text in _docstrings(of):
        block = re.search(r"^Args:\n((?:(?: {4}.*)?\n?)*)", text, re.MULTILINE)
        if block is None:
            continue
        for name, meaning in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", block[1], re.MULTILINE):
            words.setdefault(name, " ".join(meaning.split()))
    return words


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)  # a class without its module
    text = re.sub(r"Literal\[([^]]*)\]", lambda choices: re.sub("[\"']", "", choices[1]).replace(", ", " or "), text)
    text = {"OptimizerCallable": "optimizer", "OnBadRow": "error or skip"}.get(text, text)
    return f"`{text.replace(' | ', ' or ').replace('None', 'null')}`"


def _default(of: Any, parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "required"
    if dataclasses.is_dataclass(of):
        field = next(field for field in dataclasses.fields(of) if field.name == parameter.name)
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
    return _plain(value)


def _plain(value: Any) -> str:
    """A default as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'"{value}"' if not value or not value.isidentifier() else value
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, dict | list | tuple):
        return "{}" if isinstance(value, dict) else str(list(value))
    return "AdamW, lr 1e-6" if inspect.isfunction(value) else "its own defaults"


if __name__ == "__main__":
    print(markdown(), end="")
