"""Addition of two n-digit numbers, worked column by column; the least significant digit comes first.

`123+456=` is answered by `36009;25007;14005;#0579`: per column the two digits, the carry in and the two-digit sum;
after `#` the (n+1)-digit sum. The worked response can be spoilt on purpose, which makes students with a misconception
(they drop carries) and noisy teachers, and written in another style, which makes teachers that are far from a student.
"""

from __future__ import annotations

import random
from typing import Any

from kdrl_pl.data.prompts import Prompt

ALPHABET = "0123456789+=;#"
STYLES = {"plain": "{x}{y}{carry}{sum:02d};", "foreign": "{y}+{x}+{carry}={sum:02d};"}  # of a column


def generate(
    rng: random.Random, digits: int = 3, drop_carry: float = 0.0, noise: float = 0.0, style: str = "plain"
) -> tuple[str, dict[str, Any]]:
    """One problem: key and row with prompt, answer and worked response.

    The options that spoil or restyle the response change neither the prompts nor their answers.

    Args:
        rng: where the problem comes from.
        digits: n; both numbers are uniform among 0 ... 10^n - 1 and written with n digits.
        drop_carry: probability that a carry is forgotten, for each carry, the last (the leading digit) included.
        noise: probability, per column, that the last digit of the column's sum is a wrong one.
        style: of the response: "plain", or "foreign", which writes the columns as `6+3+0=09;`, second number first.

    Raises:
        ValueError: an option is out of range.
    """
    if not isinstance(digits, int) or not 1 <= digits <= 100:
        raise ValueError(f"addition: digits is {digits!r}; expected a whole number from 1 to 100")
    for name, value in (("drop_carry", drop_carry), ("noise", noise)):
        if not 0 <= value <= 1:
            raise ValueError(f"addition: {name} is {value!r}; expected a probability from 0 to 1")
    if style not in STYLES:
        raise ValueError(f"addition: style is {style!r}; expected one of {', '.join(STYLES)}")
    a, b = (rng.randrange(10**digits) for _ in range(2))
    spoiler = random.Random(rng.getrandbits(64))  # its own stream, so that spoiling leaves the next problems alone
    row = {
        "prompt": f"{a:0{digits}d}+{b:0{digits}d}=",
        "answer": f"{a + b:0{digits + 1}d}",
        "response": _work(a, b, digits, drop_carry, noise, STYLES[style], spoiler),
    }
    return f"{min(a, b)}+{max(a, b)}/{digits}", row


def _work(a: int, b: int, digits: int, drop_carry: float, noise: float, column: str, spoiler: random.Random) -> str:
    columns, result, carry = [], "", 0
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        tens, ones = divmod(x + y + carry, 10)
        if spoiler.random() < noise:
            ones = (ones + spoiler.randint(1, 9)) % 10
        columns.append(column.format(x=x, y=y, carry=carry, sum=10 * tens + ones))
        result = f"{ones}{result}"
        carry = 0 if tens and spoiler.random() < drop_carry else tens
    return f"{''.join(columns)}#{carry}{result}"


def read(text: str) -> str:
    """The sum that a response states, the text after `#`; "" where there is none."""
    return text.partition("#")[2].strip()


def verify(prompt: Prompt, text: str) -> bool:
    """Whether the text after `#` is the sum, written with n+1 digits."""
    return read(text) == prompt.answer
