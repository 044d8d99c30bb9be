"""What a study is, as its YAML file says it: arms × seeds × testbeds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_pl.cli.configs import read_yaml
from kdrl_pl.resources import find

_STUDY = ("name", "testbeds", "arms", "seeds", "rollouts", "baseline", "compare", "plot", "jobs", "threads")
_SETTING = re.compile(r"[A-Za-z_]\w*(\.[\w+-]+)+")
_OURS = ("run.", "rollout.seed", "data.seed")  # what the study sets itself, in every run


@dataclass(frozen=True)
class Arm:
    """One method of a study.

    Args:
        config: overlays over the testbed's config.
        set: further settings, dotted name -> value, as on the command line.
        seeds: of this arm.
        testbeds: names of those it runs on.
        sft: the arm imitates the teacher's right responses instead, with these settings of `kdrl sft`.
    """

    config: tuple[str, ...]
    set: Mapping[str, Any]
    seeds: tuple[int, ...]
    testbeds: tuple[str, ...]
    sft: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Study:
    """Arms that start from the same models and get the same number of rollouts.

    Args:
        name: of its folder and of its JSON and plot beside a page.
        testbeds: name -> config files, laid over each other; together they are a complete config.
        arms: name -> `Arm`.
        rollouts: of every run; None = `run.max_rollouts` of the testbed's config.
        pairs: (arm, arm it is compared with).
        plot: arms whose learning curves are drawn.
        jobs: runs at the same time.
        threads: of each run; None leaves it to torch, or is 1 with several jobs.
    """

    name: str
    testbeds: Mapping[str, tuple[str, ...]]
    arms: Mapping[str, Arm]
    rollouts: int | None
    pairs: tuple[tuple[str, str], ...]
    plot: tuple[str, ...]
    jobs: int = 1
    threads: int | None = None


def read_study(file: str) -> Study:
    """The study of a YAML file.

    Args:
        file: looked up with `resources.find`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a key is unknown, missing or of another kind than expected; says which, and what was expected.
    """
    path = Path(find(file)).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no study {file!r} (looked in {Path.cwd()})")
    content = read_yaml(path)
    try:
        return _study(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def unknown(what: str, name: Any, known: Iterable[str]) -> ValueError:
    """The error for a name that is not there, with the nearest that is."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return ValueError(f"there is no {what} {name!r}; {hint}")


def _study(content: Any) -> Study:
    content = _mapping(content, "a study", _STUDY)
    for key in ("name", "testbeds", "arms"):
        if not content.get(key):
            raise ValueError(f"{key}: is missing; a study has a name, testbeds and arms")
    testbeds = {}
    for name, value in _named(content["testbeds"], "testbeds").items():
        testbed = _mapping(value, f"testbeds.{name}", ("config",))
        testbeds[name] = _texts(testbed.get("config") or [], f"testbeds.{name}.config")
        if not testbeds[name]:
            raise ValueError(f"testbeds.{name}.config: names no file; expected those of a complete run")
    seeds = _seeds(content.get("seeds", [0]), "seeds")
    arms = {name: _arm(name, value, seeds, tuple(testbeds)) for name, value in _named(content["arms"], "arms").items()}
    plot = _texts(content.get("plot") or list(arms), "plot")
    for arm in plot:
        _check_arm(arm, arms, "plot")
    return Study(
        name=_name(content["name"], "name"),
        testbeds=testbeds,
        arms=arms,
        rollouts=_count(content, "rollouts"),
        pairs=_pairs(content, arms),
        plot=plot,
        jobs=_count(content, "jobs") or 1,
        threads=_count(content, "threads"),
    )


def _arm(name: str, value: Any, seeds: tuple[int, ...], testbeds: tuple[str, ...]) -> Arm:
    where = f"arms.{name}"
    value = _mapping(value or {}, where, ("config", "set", "seeds", "testbeds", "sft"))
    settings, sft = _settings(value.get("set") or {}, f"{where}.set"), value.get("sft")
    if sft is not None:
        sft = _settings(sft, f"{where}.sft")
        if settings or value.get("config"):
            raise ValueError(f"{where}.sft: stands alone; its settings are those of kdrl sft, without config or set")
    chosen = _texts(value.get("testbeds") or testbeds, f"{where}.testbeds")
    for testbed in chosen:
        if testbed not in testbeds:
            raise ValueError(f"{where}.testbeds: {unknown('testbed', testbed, testbeds)}")
    return Arm(
        config=_texts(value.get("config") or [], f"{where}.config"),
        set=settings,
        sft=sft,
        seeds=_seeds(value["seeds"], f"{where}.seeds") if "seeds" in value else seeds,
        testbeds=chosen,
    )


def _settings(settings: Any, where: str) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: is {settings!r}; expected settings like model.distillation.coef: 0.1")
    for setting in settings:
        if not _SETTING.fullmatch(str(setting)):  # it becomes an option: --allow-import and the like are the user's
            raise ValueError(f"{where}: {setting!r} is no setting; expected one like model.distillation.coef")
        if str(setting).startswith(_OURS):
            raise ValueError(f"{where}: {setting} is what the study sets itself; expected settings of the method")
    return {str(key): item for key, item in settings.items()}


def _pairs(content: Mapping[str, Any], arms: Mapping[str, Arm]) -> tuple[tuple[str, str], ...]:
    """Every arm against `baseline`, then what `compare` names; each pair once."""
    baseline, compare = content.get("baseline"), content.get("compare") or []
    pairs = []
    if baseline is not None:
        _check_arm(baseline, arms, "baseline")
        pairs = [(arm, baseline) for arm in arms if arm != baseline]
    if not isinstance(compare, list):
        raise ValueError(f"compare: is {compare!r}; expected pairs like [[kdrl, grpo]]")
    for pair in compare:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"compare: {pair!r} is no pair; expected two arms like [kdrl, grpo]")
        for arm in pair:
            _check_arm(arm, arms, "compare")
        pairs.append((pair[0], pair[1]))
    return tuple(dict.fromkeys(pairs))


def _check_arm(arm: Any, arms: Mapping[str, Arm], where: str) -> None:
    if arm not in arms:
        raise ValueError(f"{where}: {unknown('arm', arm, arms)}")


def _mapping(value: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is {value!r}; expected a mapping with {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise ValueError(f"{where}: {unknown('key', key, keys)}")
    return value


def _named(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is {value!r}; expected names with their config below them")
    return {_name(name, where): item for name, item in value.items()}


def _name(name: Any, where: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", str(name)):
        raise ValueError(f"{where}: {name!r} becomes a folder; expected letters, digits and . _ + - only")
    return str(name)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"{where}: is {value!r}; expected a list of names")
    return tuple(values)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise ValueError(f"{where}: is {value!r}; expected numbers like [0, 1, 2]")
    return tuple(dict.fromkeys(value))


def _count(content: Mapping[str, Any], key: str) -> int | None:
    value = content.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{key}: is {value!r}; expected a whole number from 1 on")
    return value
