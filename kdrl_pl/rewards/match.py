"""Rewards that compare an extracted text or number with the reference answer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from kdrl_pl.rewards.base import CannotJudge, Completion, RewardOutput
from kdrl_pl.rewards.numeric import last_number, parse_number
from kdrl_pl.rewards.text import after_marker, last_boxed, normalize, reference_answer


def verdicts(statuses: Sequence[str], answers: Sequence[str | None], correct: float, wrong: float) -> RewardOutput:
    """The output for rows that are each "correct", or wrong in one way or another, of which "unparsable" is counted."""
    right = [status == "correct" for status in statuses]
    return RewardOutput(
        values=[correct if r else wrong for r in right],
        correct=right,
        answers=list(answers),
        metrics={"unparsable": (float(statuses.count("unparsable")), float(len(statuses)))},
    )


class _Match:
    def __init__(
        self, marker: str | None, boxed: bool, answer_marker: str | None, correct: float, wrong: float
    ) -> None:
        name = type(self).__name__
        if marker == "" or answer_marker == "":
            raise ValueError(f"{name} got an empty marker; leave it out (null) to read the whole text")
        if marker is not None and boxed:
            raise ValueError(f"{name} got marker={marker!r} and boxed=True; an answer has one place: keep one of them")
        self.marker = marker
        self.boxed = boxed
        self.answer_marker = answer_marker
        self.correct = correct
        self.wrong = wrong

    def _extract(self, text: str) -> str | None:
        if self.boxed:
            return last_boxed(text)
        return text if self.marker is None else after_marker(text, self.marker)

    def _verdicts(self, judged: Sequence[tuple[str | None, bool]]) -> RewardOutput:
        """The output for rows of (answer or None, whether it is right)."""
        statuses = ["unparsable" if a is None else "correct" if right else "wrong" for a, right in judged]
        return verdicts(statuses, [answer for answer, _ in judged], self.correct, self.wrong)


class ExactMatch(_Match):
    r"""Right when the extracted text equals the reference answer; white space and Unicode composition are normalised.

    Metrics: `unparsable`, the rows without marker or finished box; they are wrong.

    Args:
        marker: the answer is what follows the last occurrence of this text, to the end of its line, e.g. `#`; a tag
            such as `<answer>` ends at its closing tag. Without marker and `boxed` the whole completion is the answer.
        boxed: the answer is the content of the last `\boxed{...}`.
        ignore_case: capital and small letters are the same.
        answer_marker: the reference is what follows this text in the answer column, e.g. `####` for GSM8K.
        correct: the value of a right answer.
        wrong: the value of a wrong answer.

    Raises:
        ValueError: both `marker` and `boxed`; in a call, a row without reference answer.
    """

    def __init__(
        self,
        marker: str | None = None,
        boxed: bool = False,
        ignore_case: bool = False,
        answer_marker: str | None = None,
        correct: float = 1.0,
        wrong: float = 0.0,
    ) -> None:
        super().__init__(marker, boxed, answer_marker, correct, wrong)
        self.ignore_case = ignore_case

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        return self._verdicts([self._judge(completion) for completion in completions])

    def _judge(self, completion: Completion) -> tuple[str | None, bool]:
        reference = normalize(reference_answer(completion, self.answer_marker), self.ignore_case)
        found = self._extract(completion.text)
        answer = None if found is None else normalize(found, self.ignore_case)
        return answer, answer == reference


class NumericMatch(_Match):
    r"""Right when the extracted number equals the reference number; compared exactly unless a tolerance is given.

    Read are signs, decimals, thousands commas, fractions (`3/4`, `\frac{3}{4}`) and exponents (`1.5e3`); digits are
    ASCII, and nothing is evaluated. A percent sign is a unit: `50%` is 50, never 0.5, on both sides. From a marker or a
    box exactly one number is accepted, a unit and a currency beside it (`$72 per day`), so a list of guesses is
    unparsable. Scale words are refused where they are known (`5 million`), letters otherwise taken for a unit (`5k`).

    Metrics: `unparsable`, the rows without a number where it is looked for; they are wrong.

    Args:
        marker: the answer follows the last occurrence of this text, e.g. `####`; a tag such as `<answer>` ends at its
            closing tag. Without marker and `boxed` the answer is the last number of the completion.
        boxed: the answer is the content of the last `\boxed{...}`.
        relative_tolerance: accepted difference as a share of the reference; 0 compares exactly (1/3 is not 0.333).
        absolute_tolerance: accepted difference; the larger of the two counts.
        answer_marker: the reference is what follows this text in the answer column, e.g. `####` for GSM8K.
        correct: the value of a right answer.
        wrong: the value of a wrong answer.

    Raises:
        ValueError: both `marker` and `boxed`, or a negative tolerance; in a call, a row whose reference is missing or
            is not one number.
    """

    def __init__(
        self,
        marker: str | None = None,
        boxed: bool = False,
        relative_tolerance: float = 0.0,
        absolute_tolerance: float = 0.0,
        answer_marker: str | None = None,
        correct: float = 1.0,
        wrong: float = 0.0,
    ) -> None:
        super().__init__(marker, boxed, answer_marker, correct, wrong)
        for name, value in (("relative", relative_tolerance), ("absolute", absolute_tolerance)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}_tolerance is {value}; expected a finite number of at least 0")
        self.relative_tolerance = Fraction(relative_tolerance)
        self.absolute_tolerance = Fraction(absolute_tolerance)

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        return self._verdicts([self._judge(completion) for completion in completions])

    def _judge(self, completion: Completion) -> tuple[str | None, bool]:
        text = reference_answer(completion, self.answer_marker)
        reference = parse_number(text)
        if reference is None:
            raise CannotJudge(
                f"the reference answer {text!r} of row {completion.prompt.uid!r} is not one number; use ExactMatch for"
                " words, MathReward for expressions, or answer_marker if the number stands at its end"
            )
        found = self._extract(completion.text) or ""
        number = last_number(found) if self.marker is None and not self.boxed else parse_number(found)
        if number is None:
            return None, False
        tolerance = max(self.absolute_tolerance, self.relative_tolerance * abs(reference))
        return str(number), abs(number - reference) <= tolerance
