"""A reward of one's own: one Python function of one completion."""

from __future__ import annotations

import functools
import importlib
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from kdrl_pl.rewards.base import CannotJudge, Completion, RewardOutput

_allowed: tuple[str, ...] | None = None  # None: this is a program of its own, not a config that anyone may have written


def restrict_imports(names: Sequence[str]) -> None:
    """From now on `import_function` imports from these packages only; the command line does this.

    Args:
        names: modules or packages, what lies below them included.
    """
    global _allowed
    _allowed = tuple(names)


def import_function(path: str) -> Callable[..., Any]:
    """The function named by an import path such as `my_project.rewards.exact`: the one place that turns text into code.

    Raises:
        ValueError: the path is no dotted path, its module or function is not there or is not callable, or it (or the
            place where the function was defined) is not among the names of `restrict_imports`.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{path!r} is no import path; expected package.module.function")
    _check_allowed(path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(
            f"cannot import {path!r}: there is no module {error.name!r}; install it, or put its folder on PYTHONPATH"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(n for n, value in vars(module).items() if inspect.isfunction(value) and n[0] != "_")
        raise ValueError(f"{module_name} has no function {name!r}; it has: {', '.join(found) or 'none'}")
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if home := getattr(inner, "__module__", None):  # the module may have imported it from elsewhere
        _check_allowed(f"{home}.{getattr(inner, '__qualname__', name)}")
    return function


def _check_allowed(path: str) -> None:
    if _allowed is not None and not any(f"{path}.".startswith(f"{allowed}.") for allowed in _allowed):
        raise ValueError(
            f"{path} is not among the packages that a config may import. If you trust it, add "
            f"--allow-import {path.partition('.')[0]}"
        )


def resolve(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """A callable as it is, an import path imported."""
    return import_function(function) if isinstance(function, str) else function


class FunctionReward:
    """Calls a Python function once per completion; its arguments are given by name, and it gets those it names.

    Example of such a function, given in YAML as `function: my_project.exact`:

        def exact(completion: str, answer: str) -> bool:
            return completion.strip() == answer

    It may name `completion` (the response's text), `answer` (the reference answer or None), `prompt` (what the model
    read), `truncated` (bool), `token_ids`, and any column of the data set; `**columns` takes all the rest. It returns a
    number, a bool (1 or 0), or None where it does not apply.

    Args:
        function: the function, or its import path `package.module.function`.
        correct_threshold: values from here on count as a correct answer; null when the function does not judge
            correctness.

    Raises:
        ValueError: in the first call, the function cannot be imported, or wants an argument that a row does not have.
        TypeError: the function returned something else than a number, a bool or None.
    """

    def __init__(
        self, function: str | Callable[..., float | bool | None], correct_threshold: float | None = 1.0
    ) -> None:
        self.function = function
        self.correct_threshold = correct_threshold
        self._resolved: Callable[..., Any] | None = None

    def setup(self) -> None:
        """Import the function, so that a wrong path shows before the first rollout."""
        self._resolved = resolve(self.function)

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        if self._resolved is None:
            self.setup()
        parameters = list(inspect.signature(self._resolved).parameters.values())
        values = [self._value(completion, parameters) for completion in completions]
        if self.correct_threshold is None:
            return RewardOutput(values)
        return RewardOutput(values, [None if v is None else v >= self.correct_threshold for v in values])

    def _value(self, completion: Completion, parameters: Sequence[inspect.Parameter]) -> float | None:
        prompt = completion.prompt
        available = {
            **prompt.columns,
            "completion": completion.text,
            "answer": prompt.answer,
            "prompt": prompt.text,
            "truncated": completion.truncated,
            "token_ids": completion.token_ids,
        }
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            for p in parameters:
                if p.name not in available and p.default is p.empty and p.kind is not p.VAR_POSITIONAL:
                    raise CannotJudge(
                        f"{_name(self.function)} wants {p.name!r}, which row {prompt.uid!r} does not have; there are:"
                        f" {', '.join(sorted(available))}"
                    )
            available = {p.name: available[p.name] for p in parameters if p.name in available}
        value = self._resolved(**available)
        if value is None:
            return None
        if not isinstance(value, numbers.Real) and hasattr(value, "item"):
            value = value.item()  # a numpy bool, a tensor with one element
        if not isinstance(value, numbers.Real):
            raise TypeError(
                f"{_name(self.function)} returned {value!r} ({type(value).__name__}) for row {prompt.uid!r}; expected a"
                " number, a bool or None"
            )
        return float(value)


def _name(function: str | Callable[..., Any]) -> str:
    return function if isinstance(function, str) else getattr(function, "__qualname__", repr(function))
