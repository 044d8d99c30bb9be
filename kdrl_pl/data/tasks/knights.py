"""Knights and knaves round a table: who always speaks the truth, found by supposing and going round.

Each islander says one thing of the next one round the table: K "is a knight", N "is a knave", `=` "is as I am", `/` "is
not as I am". Knights speak only true sentences, knaves only false ones, so who speaks and what is said give the next
one's role. The last one speaks of the first, and exactly one seating fits: `KN/:` means A says that B is a knight, B
that C is a knave, C that A is not as C is. The worked response supposes that the first is a knight, goes round, and
holds what the last one makes of the first against the supposition; if they differ it supposes a knave:
`KKNN;NNKN#NNK`, after `#` the seating that fits. It can be spoilt on purpose, which makes students with a misconception
(an accusation is believed, whoever utters it) and noisy teachers, and written in another style, which makes teachers
that are far from a student.
"""

from __future__ import annotations

import random
from typing import Any

from kdrl_pl.data.prompts import Prompt

ALPHABET = "KN=/:;#+-,"
STYLES = {  # how the roles are written while going round, in the order they are supposed; before a second try
    "plain": ({"K": "K", "N": "N"}, ";"),
    "foreign": ({"N": "-", "K": "+"}, ","),
}


def generate(
    rng: random.Random, islanders: int = 10, hearsay: float = 0.0, noise: float = 0.0, style: str = "plain"
) -> tuple[str, dict[str, Any]]:
    """One problem with a single solution: key and row with prompt, answer and worked response.

    The options that spoil or restyle the response change neither the prompts nor their answers.

    Args:
        rng: where the problem comes from.
        islanders: how many sit round the table.
        hearsay: probability, per "is a knave" of a knave, that it is believed.
        noise: probability, per sentence, that the wrong role is put down; hearsay comes after it.
        style: of the response: "plain", or "foreign", which supposes a knave first and writes `+` for knights, `-` for
            knaves and `,` between the two tries.

    Raises:
        ValueError: an option is out of range.
    """
    if not isinstance(islanders, int) or not 2 <= islanders <= 100:
        raise ValueError(f"knights: islanders is {islanders!r}; expected a whole number from 2 to 100")
    for name, value in (("hearsay", hearsay), ("noise", noise)):
        if not 0 <= value <= 1:
            raise ValueError(f"knights: {name} is {value!r}; expected a probability from 0 to 1")
    if style not in STYLES:
        raise ValueError(f"knights: style is {style!r}; expected one of {', '.join(STYLES)}")
    sentences = ""
    while not set(sentences) & {"=", "/"}:  # without these two, turning all roles round makes a second seating or none
        sentences = "".join(rng.choice("KN=/") for _ in range(islanders))
    spoiler = random.Random(rng.getrandbits(64))  # its own stream, so that spoiling leaves the next problems alone
    row = {
        "prompt": f"{sentences}:",
        "answer": _work(sentences, 0.0, 0.0, STYLES["plain"], spoiler).partition("#")[2],
        "response": _work(sentences, hearsay, noise, STYLES[style], spoiler),
    }
    return min(sentences[i:] + sentences[:i] for i in range(islanders)), row  # the same table, whoever is named first


def _next_role(speaker: str, sentence: str) -> str:
    """The role of the next one, K or N, given the speaker's role and what the speaker says."""
    if sentence in "=/":  # a knight's "as I am" and a knave's untrue "as I am" both speak of a knight
        return "K" if sentence == "=" else "N"
    return "K" if sentence == speaker else "N"


def _work(
    sentences: str, hearsay: float, noise: float, style: tuple[dict[str, str], str], spoiler: random.Random
) -> str:
    written, separator = style
    tries = []
    for supposed in written:
        roles = supposed
        for sentence in sentences:
            role = _next_role(roles[-1], sentence)
            if spoiler.random() < noise:
                role = "N" if role == "K" else "K"
            if roles[-1] == sentence == "N" and spoiler.random() < hearsay:
                role = "N"
            roles += role
        tries.append("".join(written[role] for role in roles))
        if roles[-1] == supposed:
            return f"{separator.join(tries)}#{roles[:-1]}"
    return f"{separator.join(tries)}#"  # spoilt: nothing fitted


def read(text: str) -> str:
    """The seating that a response states, the text after `#`; "" where there is none."""
    return text.partition("#")[2].strip()


def verify(prompt: Prompt, text: str) -> bool:
    """Whether the text after `#` is the one seating that fits, a letter for each islander."""
    return read(text) == prompt.answer
