"""What a parser says of a wrong setting, in one short message with the cure."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import NoReturn

_NOISE = (
    "Expected a <class 'NoneType'>",
    "Parser key",
    "Does not validate",
    "Expected a path but",
    "Problem with given",
    "Subtypes:",
    "Errors:",
)
_WRAPPING = re.compile(r"Type typing\.Callable\S* \S+ expects a function or a callable class: ")
_EXPECTED = re.compile(r"Expected a (?:<class '([^']+)'>|typing\.Literal\[([^\]]*)\]|(dot import path))")
_VALUE = re.compile(r"(?:(?:Given|Got) value|import path string): (.+?)(?=\. Got value: |$)", re.MULTILINE)
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "names with their values below them",
    "list": "a list",
    "NoneType": "null",
}
_CLASS = "the path of a class (package.module.Class)"
# Settings of other libraries of which fewer values are sound than their type allows.
_SOUND = {"trainer.precision": "32-true or bf16-mixed"}


class SettingsError(ValueError):
    """A setting on the command line or in a config file is wrong."""


class Parser(argparse.ArgumentParser):
    """For commands without config files: their errors read like those of the others; exit status 2."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and the end."""
        if match := re.search(r"unrecognized arguments: (\S+)", message):
            message = _unknown(match[1].partition("=")[0], self._option_string_actions)
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help says what there is\n")


def explain(message: str, options: Iterable[str]) -> str:
    """The message without the parser's internals.

    Args:
        message: of a jsonargparse error.
        options: every option there is, like `--model.student`.
    """
    if match := re.search(r"Importing '([^']+)' is not allowed", message):
        name = match[1]
        return (
            f"{name} is not among the packages that a config may import. If you trust it, add "
            f"--allow-import {name.partition('.')[0]}"
        )
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        return _unknown(match[1].partition("=")[0], options)
    if match := re.search(r"(?:Key|(?:(Group '\w+)|Subcommand '\w+)' does not accept option) '([^']+)'", message):
        return _unknown(f"--{f'{match[1][7:]}.' if match[1] else ''}{match[2]}", options)
    if match := re.search(r"the following arguments are required: (.+)", message):
        names = [f"--{name.partition('.')[2]}" for name in match[1].split(", ")]
        return f"these settings are missing: {', '.join(names)}; start from a file with --config, see configs/"
    message = _WRAPPING.sub("", message)
    key = re.search(r'Parser key "([^"]+)":?\s*', message)
    where, rest = (f"{_path(key[1], message)}: ", message[key.end() :]) if key else ("", message)
    if match := re.search(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", rest):
        names = _parameters(match[1])
        return f"{where}{_unknown(match[2], names, 'it takes ' + ', '.join(names))}"
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", rest):
        return f"{where}{_not_in(match[2], match[1])}"
    if match := re.search(r"No module named '([^']+)'", rest):
        return f"{where}there is no module {match[1]!r}; install it, or put its folder on PYTHONPATH"
    if match := re.search(r"Expected '([^']+)' to be a subclass of <class '(?:[^']*\.)?([^'.]+)'>", rest):
        return f"{where}{match[1]} is no {match[2]}; expected the path of one"
    if match := re.search(r"Import path (\S+) does not implement protocol (\w+)", rest):
        return f"{where}{match[1]} is no {match[2]}; expected the path of one"
    if match := re.search(r"Unable to load config '([^']+)'\s+- (.+)", rest):
        return f"{where}{match[1]} is not readable as YAML: {match[2]}"
    reasons = [line.strip().removeprefix("- ") for line in rest.partition("Given value")[0].splitlines()]
    reasons = [reason for reason in reasons if reason and not reason.startswith(_NOISE)]
    if reasons and _EXPECTED.match(reasons[0]):
        return f"{where}{_wrong_type(rest, _SOUND.get(where[:-2]))}"
    return f"{where}{reasons[0] if reasons else rest.strip()}"


def _path(outermost: str, message: str) -> str:
    """The setting that is wrong: the parser names it from outside to inside, each part on its own."""
    if nested := re.findall(r"NestedArg\(key='([^']+)'", message):
        return f"{outermost}.{nested[-1]}"
    return ": ".join(re.findall(r'Parser key "([^"]+)"', message))


def _wrong_type(message: str, sound: str | None) -> str:
    """What was found and what was expected; of types within types the innermost."""
    value = _VALUE.search(message)
    innermost = message.partition("Given value")[0]
    expected = [
        _WORDS.get(name, name) if name else choices.replace("'", "") or _CLASS
        for name, choices, _ in _EXPECTED.findall(innermost)
    ]
    if "<class 'torch.Tensor'>" in innermost:  # torch's own way to say that a number may be a tensor
        expected = [kind for kind in expected if kind != _CLASS]
    found = f"is {value[1]!r}; " if value else ""
    return f"{found}expected {sound or ' or '.join(dict.fromkeys(expected))}"


def _unknown(option: str, options: Iterable[str], otherwise: str = "--help lists them all") -> str:
    near = difflib.get_close_matches(option, list(options), n=1, cutoff=0.6)
    return f"there is no setting {option}; {f'did you mean {near[0]}?' if near else otherwise}"


def _not_in(name: str, module: str) -> str:
    """For a name that a module lacks; the module was imported already."""
    names = [known for known in dir(sys.modules[module]) if not known.startswith("_")]
    near = difflib.get_close_matches(name, names, n=1)
    return f"there is no {name} in {module}; {f'did you mean {near[0]}?' if near else 'expected a class of it'}"


def _parameters(class_path: str) -> list[str]:
    """Names of the arguments of a class that was found already, so importing it again runs nothing new."""
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)
