"""Knights and knaves: who of three islanders always speaks the truth, worked through the eight assignments.

Each of A, B and C makes one statement about the roles; knights (K) speak only true statements, knaves (N) only false
ones, and exactly one assignment fits. In the prompt `B=N,A/C,A>B:` A says that B is a knave, B that A and C differ, and
C that B is a knight if A is one. `=` says the same role, `/` different roles, `&` both knights, `|` at least one
knight, `>` if the first is a knight so is the second; K and N stand for the roles themselves.

The worked response tries the assignments in turn, all knaves first, and puts down what each statement then is, T or F,
until an islander does not speak according to role: `NNNT;NNKFF...#NKN`, after `#` the assignment that fits. It can be
spoilt on purpose, which makes students with a misconception (what a knave says is not checked) and noisy teachers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

from kdrl_pl.data.prompts import Prompt

ALPHABET = "ABCKNTF=/&|>,:;#"
NAMES = "ABC"
STYLES = {"plain": "NKFT;", "foreign": "KN/=,"}  # the role tried first, the other; false, true; before the next try
_MEANINGS: dict[str, Callable[[bool, bool], bool]] = {
    "=": lambda x, y: x == y,
    "/": lambda x, y: x != y,
    "&": lambda x, y: x and y,
    "|": lambda x, y: x or y,
    ">": lambda x, y: not x or y,
}
_KINDS = "=/&|>KN"


def generate(
    rng: random.Random, presume_lies: float = 0.0, noise: float = 0.0, style: str = "plain"
) -> tuple[str, dict[str, Any]]:
    """One problem with a single solution: key and row with prompt, answer and worked response.

    The options that spoil or restyle the response change neither the prompts nor their answers.

    Args:
        rng: where the problem comes from.
        presume_lies: probability, per statement of a knave, that it is put down as false without a look at it.
        noise: probability, per statement, that the wrong one of T and F is put down.
        style: of the response: "plain", or "foreign", which starts from all knights and writes `=` for T, `/` for F and
            `,` between assignments.

    Raises:
        ValueError: an option is out of range.
    """
    for name, value in (("presume_lies", presume_lies), ("noise", noise)):
        if not 0 <= value <= 1:
            raise ValueError(f"knights: {name} is {value!r}; expected a probability from 0 to 1")
    if style not in STYLES:
        raise ValueError(f"knights: style is {style!r}; expected one of {', '.join(STYLES)}")
    fitting: list[str] = []
    while len(fitting) != 1:
        statements = [_statement(rng, speaker) for speaker in NAMES]
        fitting = solutions(statements)
    spoiler = random.Random(rng.getrandbits(64))  # its own stream, so that spoiling leaves the next problems alone
    row = {
        "prompt": f"{','.join(statements)}:",
        "answer": fitting[0],
        "response": _work(statements, presume_lies, noise, STYLES[style], spoiler),
    }
    return ",".join(map(_meaning_of, statements)), row


def _statement(rng: random.Random, speaker: str) -> str:
    kind = rng.choice(_KINDS)
    if kind in "KN":
        return f"{rng.choice([name for name in NAMES if name != speaker])}={kind}"
    first, second = rng.sample(NAMES, 2)
    return f"{first}{kind}{second}"


def _meaning_of(statement: str) -> str:
    """The statement with its two sides in order, where their order means nothing."""
    first, kind, second = statement
    return statement if kind == ">" else f"{min(first, second)}{kind}{max(first, second)}"


def is_true(statement: str, roles: str) -> bool:
    """Whether a statement such as `A>B` is true when the islanders' roles are, for example, "KNK"."""
    first, kind, second = statement
    role = {**dict(zip(NAMES, roles, strict=True)), "K": "K", "N": "N"}
    return _MEANINGS[kind](role[first] == "K", role[second] == "K")


def solutions(statements: list[str]) -> list[str]:
    """Every assignment under which the knights' statements are true and the knaves' false."""
    assignments = map("".join, product("NK", repeat=len(NAMES)))
    return [roles for roles in assignments if all(is_true(s, roles) == (r == "K") for s, r in zip(statements, roles))]


def _work(statements: list[str], presume_lies: float, noise: float, style: str, spoiler: random.Random) -> str:
    first, second, false, true, separator = style
    tried = ""
    for roles in map("".join, product((first, second), repeat=len(NAMES))):
        tried += roles
        for statement, role in zip(statements, roles, strict=True):
            said = is_true(statement, roles)
            if role == "N" and spoiler.random() < presume_lies:
                said = False
            if spoiler.random() < noise:
                said = not said
            tried += true if said else false
            if said != (role == "K"):
                tried += separator
                break
        else:
            return f"{tried}#{roles}"
    return f"{tried}#"  # spoilt: nothing fitted


def read(text: str) -> str:
    """The roles that a response states, the text after `#`; "" where there is none."""
    return text.partition("#")[2].strip()


def verify(prompt: Prompt, text: str) -> bool:
    """Whether the text after `#` is the one assignment that fits, as three letters."""
    return read(text) == prompt.answer
