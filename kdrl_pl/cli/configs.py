"""Config files laid over each other key by key, before the parser sees them.

The parser itself replaces whole mappings of named things (data sets, rewards), so that an overlay that reaches one of
them would drop the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdrl_pl.resources import find


def merge_configs(arguments: list[str]) -> list[str]:
    """The arguments of a command, its `--config` files merged into one that comes first.

    So a later file wins over an earlier one, and the command line over all of them.

    Args:
        arguments: what follows the command; paths are looked up with `resources.find`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is no YAML mapping or names an output file, or the last option lacks its file.
    """
    files, rest = [], []
    waiting = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if waiting:
            files.append(argument)
            waiting = False
        elif option in ("--config", "-c"):
            waiting = not equals
            if equals:
                files.append(value)
        else:
            rest.append(argument)
    if waiting:
        raise ValueError("--config needs the path of a YAML file")
    if not files:
        return rest
    from yaml import safe_dump

    merged = read_configs(files)
    if "output" in merged:
        raise ValueError("output is for the command line only (--output FILE): it replaces a file, which no config may")
    return ["--config", safe_dump(merged, sort_keys=False), *rest]


def read_configs(files: Iterable[str]) -> dict[str, Any]:
    """Config files as one mapping, each laid over those before it.

    Args:
        files: looked up with `resources.find`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is no YAML mapping.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, _read(file))
    return merged


def merge(below: Any, above: Any) -> Any:
    """`above` laid over `below`: mappings key by key, anything else replaced.

    Another `class_path` replaces the class with all of its arguments, unless they are given again.
    """
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "class_path" in above and not _are_one_class(above["class_path"], below.get("class_path")):
        return above
    if "class_path" in below and "class_path" not in above and "init_args" not in above:
        return {**below, "init_args": merge(below.get("init_args") or {}, above)}
    return {**below, **{key: merge(below[key], value) if key in below else value for key, value in above.items()}}


def _are_one_class(path: Any, other: Any) -> bool:
    """Whether two class paths name one class: a saved config has `kdrl_pl.NAME` for those that the package exports."""
    if not isinstance(path, str) or not isinstance(other, str):
        return path == other
    ours = path.startswith("kdrl_pl.") and other.startswith("kdrl_pl.")
    return path == other or (ours and path.rpartition(".")[2] == other.rpartition(".")[2])


def _read(file: str) -> dict[str, Any]:
    path = Path(find(file)).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no config file {file!r} (looked in {Path.cwd()})")
    content = read_yaml(path)
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected sections like model:, data:, rollout:")
    return content or {}


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values only, and no key twice.

    Raises:
        ValueError: it is no YAML, names a Python object, or has a key twice, of which YAML itself would drop the first.
    """
    from yaml import MappingNode, SafeLoader, YAMLError, load
    from yaml.constructor import ConstructorError

    class Loader(SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> MappingNode:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if key.value in seen and key.value != "<<":
                    raise ConstructorError(None, None, f"{key.value!r} stands there twice; keep one", key.start_mark)
                if isinstance(key.value, str):
                    seen.add(key.value)
            return node

    try:
        return load(path.read_text(encoding="utf-8"), Loader)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML: {error}") from None
