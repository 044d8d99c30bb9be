"""Procedural tasks: problems made to order, each with an answer that a rule can check.

A task is a module with `generate(rng, **options) -> (key, row)` and `verify(prompt, text) -> bool`. A row has `prompt`
and `answer`, mostly a worked `response` to train on, and what `verify` wants; `key` names the problem apart from its
wording, and decides by a hash whether it is a training, validation or test problem.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from types import ModuleType
from typing import Any

from kdrl_pl.data.prompts import Prompt
from kdrl_pl.data.tasks import addition, countdown, knights, reasoning_gym, word_problems
from kdrl_pl.data.tasks.answers import final_answer
from kdrl_pl.rewards.base import CannotJudge

TASKS: dict[str, ModuleType] = {
    "addition": addition,
    "countdown": countdown,
    "knights": knights,
    "word_problems": word_problems,
}
_GYM = "reasoning_gym:"
_BUCKETS = {"train": range(8), "val": range(8, 9), "test": range(9, 10), "all": range(10)}
_MISSES = 20_000  # draws in a row without a new problem after which the task counts as exhausted


def names() -> list[str]:
    """What a `source` may say."""
    return [*TASKS, f"{_GYM}<task>"]


def is_task(source: str) -> bool:
    """Whether a `source` names a procedural task."""
    return source in TASKS or source.startswith(_GYM)


def make(name: str, size: int, seed: int = 0, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    """`size` different problems, the same ones for the same arguments; a smaller size makes the first of them.

    Args:
        name: "addition", "countdown", "knights", "word_problems" or "reasoning_gym:<task>".
        size: number of rows.
        seed: another seed draws other problems, of the same split.
        split: "train" (80 % of all problems), "val" (10 %) or "test" (10 %), disjoint whatever the seed; or "all".
        options: keyword arguments of the task.

    Raises:
        ValueError: unknown task, split or option, or the task has fewer problems.
    """
    if not is_task(name):
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(names())}")
    if split not in _BUCKETS:
        raise ValueError(f"task {name} has no split {split!r}; expected one of {', '.join(_BUCKETS)}")
    if name.startswith(_GYM):
        drawn = reasoning_gym.draw(name.removeprefix(_GYM), seed, options)
    else:
        _check_options(name, options)
        drawn = _draw(TASKS[name], random.Random(seed), options)
    rows = list(islice(_distinct(drawn, name, split), size))
    if len(rows) < size:
        raise ValueError(
            f"task {name} made only {len(rows)} different problems of split {split!r} with options {options}; "
            f"size is {size}: lower it or make the problems larger"
        )
    return rows


def verify(prompt: Prompt, text: str) -> bool:
    """Whether the response `text` solves the problem, by the rule of the task that made the prompt.

    Raises:
        CannotJudge: the prompt comes from no procedural task.
    """
    return _task_of(prompt).verify(prompt, text)


def read(prompt: Prompt, text: str) -> str | None:
    """The answer a response ends with, for counting equal ones; None where there is none.

    Raises:
        CannotJudge: the prompt comes from no procedural task.
    """
    task = _task_of(prompt)
    answer = task.read(text) if hasattr(task, "read") else final_answer(text)
    return answer or None


def _task_of(prompt: Prompt) -> ModuleType:
    name = prompt.columns.get("task")
    if not isinstance(name, str) or not is_task(name):
        raise CannotJudge(
            f"prompt {prompt.uid} has no column 'task' that names one of {', '.join(names())}; "
            "the task rule checks procedural tasks only, choose another reward for this set"
        )
    return reasoning_gym if name.startswith(_GYM) else TASKS[name]


def _check_options(name: str, options: dict[str, Any]) -> None:
    known = [option for option in inspect.signature(TASKS[name].generate).parameters if option != "rng"]
    for option in options:
        if option not in known:
            raise ValueError(f"task {name} has no option {option!r}; it has {', '.join(known)}")


def _draw(task: ModuleType, rng: random.Random, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    while True:
        yield task.generate(rng, **options)


def _distinct(drawn: Iterator[tuple[str, dict[str, Any]]], name: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of the split, each prompt once; ends when no new one has come for long."""
    seen: set[str] = set()
    misses = 0
    for key, row in drawn:
        bucket = int.from_bytes(blake2b(f"{name}/{key}".encode(), digest_size=8).digest()) % 10
        if bucket not in _BUCKETS[split] or row["prompt"] in seen:
            misses += 1
            if misses >= _MISSES:
                return
            continue
        misses = 0
        seen.add(row["prompt"])
        yield {**row, "task": name}
