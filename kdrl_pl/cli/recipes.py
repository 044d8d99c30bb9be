"""`kdrl recipes`: the runs that come with the library, by name. They are the files of configs/ and their headers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_pl.cli.configs import read_configs
from kdrl_pl.cli.errors import Parser
from kdrl_pl.files import replacing
from kdrl_pl.resources import find

_BASE = "kdrl"


@dataclass(frozen=True)
class Recipe:
    """One run.

    Args:
        name: as it is asked for.
        files: laid over each other, as --config takes them.
    """

    name: str
    files: tuple[str, ...]

    @property
    def headers(self) -> list[str]:
        """The comment that each file begins with, the one that makes the difference first."""
        return [header(file) for file in reversed(self.files)]

    @property
    def command(self) -> str:
        """How it is run."""
        settings = " ".join(f"--config {file}" for file in self.files)
        return f"kdrl {'sft' if self.name == 'sft' else 'fit'} {settings} --run.name {self.name}"


def header(file: str) -> str:
    """The comment at the top of a config, without its signs."""
    lines = []
    for line in Path(find(file)).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def recipes(base: str = _BASE) -> dict[str, Recipe]:
    """All of them by name: complete configs, then the arms, each laid over `base`.

    Args:
        base: name of a complete config.

    Raises:
        ValueError: there is none of that name.
    """
    complete = {path.stem: Recipe(path.stem, (f"configs/{path.name}",)) for path in _yaml("configs")}
    if base not in complete:
        raise ValueError(f"--base is {base}; expected one of {', '.join(complete)}")
    arms = {}
    for path in _yaml("configs/arms"):
        name = path.stem.replace("_", "-")
        arms[name] = Recipe(name, (*complete[base].files, f"configs/arms/{path.name}"))
    return complete | arms


def _yaml(folder: str) -> list[Path]:
    return sorted(Path(find(folder)).glob("*.yaml"))


def main(command: str, arguments: list[str]) -> None:
    """The runs that come with the library: list them, show one, or copy one into a file to change.

    Raises:
        ValueError: there is no recipe of that name, or the file to write is there already.
    """
    parser = Parser(prog="kdrl recipes", description=(main.__doc__ or "").partition("\n")[0])
    parser.add_argument("action", nargs="?", choices=("list", "show", "copy"), default="list")
    parser.add_argument("name", nargs="?", help="of a recipe, for show and copy")
    parser.add_argument("target", nargs="?", type=Path, help="file to write (default: NAME.yaml here)")
    parser.add_argument("--base", default=_BASE, help="complete config that an arm is laid over (default: %(default)s)")
    options = parser.parse_args(arguments)
    known = recipes(options.base)
    if options.action == "list":
        _list(known, options.base)
        return
    if options.name is None:
        raise ValueError(f"kdrl recipes {options.action} needs the name of a recipe; kdrl recipes lists them")
    recipe = known.get(options.name.replace("_", "-"))
    if recipe is None:
        raise ValueError(f"there is no recipe {options.name!r}{_near(options.name, known)}; kdrl recipes lists them")
    if options.action == "show":
        _show(recipe)
    else:
        _copy(recipe, options.target or Path(f"{recipe.name}.yaml"))


def _near(name: str, known: dict[str, Recipe]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _list(known: dict[str, Recipe], base: str) -> None:
    width = max(map(len, known))
    for arms in (False, True):
        print(f"arms, each over configs/{base}.yaml (--base quickstart is a small one):" if arms else "complete:")
        for name, recipe in known.items():
            if (len(recipe.files) > 1) == arms:
                print(f"  {name:<{width}}  {_summary(recipe.headers[0])}")
    print("\nkdrl recipes show NAME says more; kdrl recipes copy NAME FILE.yaml writes one to change")


def _summary(text: str, limit: int = 92) -> str:
    """The first sentence on one line, cut where it is long."""
    text = re.split(r"(?<=\w{3})\. (?=[A-Z])", " ".join(text.split()))[0].rstrip(".")
    return text if len(text) <= limit else f"{text[: limit - 4].rpartition(' ')[0]} ..."


def _show(recipe: Recipe) -> None:
    print(recipe.headers[0], end="\n\n")
    for text in recipe.headers[1:]:
        print(f"over {recipe.files[0]}:")
        print("\n".join(f"  {line}".rstrip() for line in text.splitlines()), end="\n\n")
    print(f"run it:\n  {recipe.command}")
    if len(recipe.files) > 1:
        body = Path(find(recipe.files[-1])).read_text(encoding="utf-8").splitlines()
        print(f"\nwhat {recipe.files[-1]} sets:")
        print("\n".join(f"  {line}" for line in body if not line.startswith("#")))


def _copy(recipe: Recipe, target: Path) -> None:
    """One file that runs by itself; a complete config keeps its comments."""
    from yaml import safe_dump

    if target.exists():
        raise ValueError(f"{target} is there already; name another file, or delete it")
    if len(recipe.files) == 1:
        text = Path(find(recipe.files[0])).read_text(encoding="utf-8")
    else:
        settings: dict[str, Any] = read_configs(recipe.files)
        settings["run"] = {**settings.get("run", {}), "name": recipe.name}
        told = "\n\n".join([*recipe.headers, f"From {' and '.join(recipe.files)} by kdrl recipes copy {recipe.name}."])
        comment = "\n".join(f"# {line}".rstrip() for line in told.splitlines())
        text = f"{comment}\n{safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        file.write(text.encode())
    print(f"wrote {target}; run it with: kdrl {'sft' if recipe.name == 'sft' else 'fit'} --config {target}")
