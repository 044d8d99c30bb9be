"""Addition with a column trace, and what spoils it."""

from __future__ import annotations

import random

import pytest

from kdrl_pl.data import tasks
from kdrl_pl.data.prompts import Prompt
from kdrl_pl.data.tasks import addition


class Fixed(random.Random):
    """Gives the two numbers wanted."""

    def __init__(self, *numbers: int) -> None:
        super().__init__(0)
        self.numbers = list(numbers)

    def randrange(self, *arguments):
        return self.numbers.pop(0)


def row_of(a: int, b: int, **options) -> dict:
    return addition.generate(Fixed(a, b), **options)[1]


@pytest.mark.parametrize(
    ("a", "b", "digits", "prompt", "response"),
    [
        (123, 456, 3, "123+456=", "36009;25007;14005;#0579"),
        (999, 1, 3, "999+001=", "91010;90110;90110;#1000"),
        (58, 67, 2, "58+67=", "87015;56112;#125"),
        (0, 0, 1, "0+0=", "00000;#00"),
    ],
)
def test_the_trace_by_hand(a, b, digits, prompt, response):
    row = row_of(a, b, digits=digits)
    assert (row["prompt"], row["response"]) == (prompt, response)
    assert row["answer"] == response.split("#")[1] == f"{a + b:0{digits + 1}d}"


def test_a_student_that_always_drops_carries():
    # 9+1 = 10, the carry is forgotten each time: 9+0 = 09 twice, and no leading 1
    assert row_of(999, 1, drop_carry=1.0)["response"] == "91010;90009;90009;#0990"
    # the carry of the only overflowing column, the leading digit
    assert row_of(900, 200, drop_carry=1.0)["response"] == "00000;00000;92011;#0100"
    assert row_of(123, 456, drop_carry=1.0)["response"] == "36009;25007;14005;#0579"  # nothing to carry


def test_a_foreign_teacher_writes_other_columns_and_the_same_sums():
    # 3+6, second number first; then 2+5 and 1+4
    assert row_of(123, 456, style="foreign")["response"] == "6+3+0=09;5+2+0=07;4+1+0=05;#0579"
    assert row_of(58, 67, digits=2, style="foreign")["response"] == "7+8+0=15;6+5+1=12;#125"
    plain, foreign = (tasks.make("addition", 100, drop_carry=0.5, noise=0.1, style=s) for s in ("plain", "foreign"))
    for one, other in zip(plain, foreign, strict=True):  # the style changes nothing but the writing
        assert one["response"].partition("#")[2] == other["response"].partition("#")[2]
        assert set(other["response"]) <= set(addition.ALPHABET)


def test_noise_in_every_column_makes_every_digit_of_the_sum_wrong_and_the_answer_follows_the_trace():
    for row in tasks.make("addition", 200, noise=1.0):
        columns, _, result = row["response"].partition("#")
        shown = [column[-1] for column in columns.rstrip(";").split(";")]
        assert list(result[:0:-1]) == shown
        assert all(x != y for x, y in zip(result[1:], row["answer"][1:], strict=True)) or "1" in [
            column[2] for column in columns.split(";")[:-1]
        ]


def test_spoiling_leaves_prompts_and_answers_alone():
    clean = tasks.make("addition", 300, seed=9)
    spoilt = tasks.make("addition", 300, seed=9, drop_carry=0.97, noise=0.1)
    assert [(r["prompt"], r["answer"]) for r in clean] == [(r["prompt"], r["answer"]) for r in spoilt]
    assert spoilt == tasks.make("addition", 300, seed=9, drop_carry=0.97, noise=0.1)


def right(rows: list[dict]) -> float:
    return sum(row["response"].endswith("#" + row["answer"]) for row in rows) / len(rows)


def test_the_student_and_the_teacher_of_the_testbed_are_as_good_as_computed():
    """20,000 rows: three standard errors are below 0.01."""
    student = tasks.make("addition", 20_000, split="all", drop_carry=0.97, noise=0.1)
    teacher = tasks.make("addition", 20_000, split="all", noise=0.08)
    assert right(teacher) == pytest.approx(0.92**3, abs=0.015)  # 0.779
    # Probability of no mistake so far, by the true carry: it is 1 after a column with probability 0.45, or 0.55 with a
    # carry in, and then it must be remembered (0.03); noise leaves a column right with 0.9.
    alive = {0: 1.0, 1: 0.0}
    for _ in range(3):
        alive = {
            0: 0.9 * (alive[0] * 0.55 + alive[1] * 0.45),
            1: 0.9 * 0.03 * (alive[0] * 0.45 + alive[1] * 0.55),
        }
    assert sum(alive.values()) == pytest.approx(0.129, abs=0.001)  # the testbed's student starts at 0.13
    assert right(student) == pytest.approx(sum(alive.values()), abs=0.015)


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("36009;25007;14005;#0579", True),
        ("#0579", True),
        ("nonsense#0579 ", True),
        ("36009;25007;14005;#579", False),
        ("36009;25007;14005;#0578", False),
        ("36009;25007;14005;0579", False),
        ("#0579#0579", False),
        ("#05790", False),
        ("", False),
    ],
)
def test_correct_iff_the_text_after_the_mark_is_the_sum(text, correct):
    prompt = Prompt("s/1", "123+456=", (1,), "0579", "s", {"task": "addition"})
    assert tasks.verify(prompt, text) is correct


@pytest.mark.parametrize(
    "options", [{"digits": 0}, {"digits": "3"}, {"drop_carry": 1.5}, {"noise": -0.1}, {"style": "loud"}]
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"addition: {next(iter(options))} is"):
        tasks.make("addition", 1, **options)
