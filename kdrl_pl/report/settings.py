"""The settings of a run, each beside its default: what a person chose is what differs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

# section -> the class that its settings build; those of kdrl sft are others
_SECTIONS = {
    "model": "kdrl_pl.module.KDRLModule",
    "data": "kdrl_pl.data.datamodule.PromptDataModule",
    "rollout": "kdrl_pl.rollout.callback.RolloutCallback",
    "run": "kdrl_pl.run_folder.RunFolder",
    "checkpoint": "kdrl_pl.checkpoint.Checkpoints",
    "view": "kdrl_pl.progress.Progress",
    "trainer": "lightning.pytorch.Trainer",
}
_OF_SFT = {
    "model": "kdrl_pl.sft.SFTModule",
    "data": "kdrl_pl.data.sft.SFTDataModule",
    "run": "kdrl_pl.cli.sft.SFTRun",
}
_SETS = ("train", "val", "test", "predict")  # of section data: name -> settings of a set
_TRUSTED = ("kdrl_pl", "torch", "lightning")  # a page imports no code of others to learn its defaults
_PLACES = {"trainer.default_root_dir"}  # set by the command line, and another one in every run


@dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Args:
        name: its path, `model.distillation.coef`; that of an object's class ends in the object's own name.
        value: as config.yaml has it.
        default: None when there is none, or it is not known.
        changed: whether it differs from the default, or has none.
    """

    name: str
    value: Any
    default: Any
    changed: bool


def settings_of(config: Mapping[str, Any]) -> list[Setting]:
    """All settings of a config.yaml but folders, those that differ from their defaults first."""
    classes = _SECTIONS if "rollout" in config else {**_SECTIONS, **_OF_SFT}
    found: list[Setting] = []
    for section, value in config.items():
        if section in classes:
            defaults = _defaults(classes[section])
            if section == "trainer":
                defaults |= _trainer_defaults("rollout" in config)
            for key, item in (value or {}).items():
                found += _walk(f"{section}.{key}", item, defaults.get(key, MISSING))
        else:
            found += _walk(section, value, 0 if section == "seed_everything" else MISSING)
    kept = [setting for setting in found if setting.name not in _PLACES]
    return sorted(kept, key=lambda setting: not setting.changed)


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Path -> value of nested settings; `init_args` and `class_path` are left out of the paths."""
    if not isinstance(config, Mapping) or not config:
        return {name: config}
    values: dict[str, Any] = {}
    for key, value in config.items():
        inner = name if key in ("class_path", "init_args") else f"{name}.{key}" if name else str(key)
        values |= flat(value, inner) if isinstance(value, Mapping) and value else {inner: value}
    return {key: value for key, value in values.items() if key not in _PLACES}


def _walk(name: str, value: Any, default: Any) -> Iterator[Setting]:
    if not isinstance(value, Mapping) or not value:
        known = default is not MISSING and default is not inspect.Parameter.empty
        changed = not known or not _same(value, default)
        yield Setting(name, value, default if known and _is_plain(default) else None, changed)
        return
    if "class_path" in value:
        usual = f"{type(default).__module__}.{type(default).__qualname__}"
        same = _find(value["class_path"]) is type(default)
        yield Setting(name, value["class_path"], usual if same else None, not same)
        defaults: Mapping[str, Any] = _defaults(value["class_path"])
        value = value.get("init_args") or {}
    elif name in {f"data.{stage}" for stage in _SETS}:
        for key, item in value.items():
            yield from _walk(f"{name}.{key}", item, _of_dataclass("kdrl_pl.data.loading.SetConfig"))
        return
    else:
        defaults = default if isinstance(default, Mapping) else getattr(default, "__dict__", {})
    for key, item in value.items():
        yield from _walk(f"{name}.{key}", item, defaults.get(key, MISSING))


def _find(path: str) -> Any:
    """The class of that path, None where it is not one of those trusted or is not there."""
    module, _, name = str(path).rpartition(".")
    if module.partition(".")[0] not in _TRUSTED:
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _defaults(path: str) -> dict[str, Any]:
    """Argument -> default of the constructor of a class; empty where it is not known."""
    found = _find(path)
    if not callable(found):
        return {}
    try:
        return {name: parameter.default for name, parameter in inspect.signature(found).parameters.items()}
    except (TypeError, ValueError):
        return {}


def _of_dataclass(path: str) -> dict[str, Any]:
    found = _find(path)
    return {field.name: field.default for field in fields(found)} if is_dataclass(found) else {}


def _trainer_defaults(is_kdrl: bool) -> dict[str, Any]:
    from kdrl_pl.cli.kdrl import KDRLCLI
    from kdrl_pl.cli.sft import SFTCLI

    return dict((KDRLCLI if is_kdrl else SFTCLI).trainer_defaults_of_command)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | Sequence | Mapping)


def _same(value: Any, default: Any) -> bool:
    if callable(default):  # the parser writes a function by its path
        default = f"{default.__module__}.{default.__qualname__}"
    return bool(value == (list(default) if isinstance(default, tuple) else default))
