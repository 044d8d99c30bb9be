"""From a configured set to prompts: columns picked, template applied, bad and over-long rows dealt with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kdrl_pl.data.prompts import Prompt
from kdrl_pl.data.readers import is_encodable
from kdrl_pl.data.sources import Row, SourceConfig, read_rows
from kdrl_pl.data.template import Renderer, RowError, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnBadRow = Literal["error", "skip"]
Parsed = TypeVar("Parsed")


@dataclass
class SetConfig(SourceConfig):
    """One named set of prompts.

    Args:
        answer_column: column with the reference answer, text or number; a dotted name reaches into a column
            ("reward_model.ground_truth"); null when the reward needs no answer.
        answer_pattern: regular expression whose first group is the answer within that column; "#### (.+)" for GSM8K.
        weight: share of this set in every training rollout, relative to the other sets.
        teacher: which of several teachers scores this set's rows (`RoutedTeacher`); null is their default.
        teacher_column: column with the name of each row's teacher, in place of `teacher`.
    """

    answer_column: str | None = "answer"
    answer_pattern: str | None = None
    weight: float = 1.0
    teacher: str | None = None
    teacher_column: str | None = None


@dataclass
class SetCounts:
    """What became of a set's rows: `rows` read = `kept` + `bad` + `too_long` (over `limit`) + `unwanted`."""

    rows: int = 0
    kept: int = 0
    bad: int = 0
    too_long: int = 0
    unwanted: int = 0
    first_problem: str = ""

    limit: str = ""

    def left_out(self) -> str:
        """What was left out and why; empty when every row was kept."""
        reasons = []
        if self.bad:
            reasons.append(f"{self.bad} bad rows skipped (the first: {self.first_problem})")
        if self.too_long:
            reasons.append(f"{self.too_long} rows over {self.limit} dropped")
        if self.unwanted:
            reasons.append(f"{self.unwanted} rows filtered out")
        return "; ".join(reasons)

    def check(self, name: str) -> None:
        """Raises ValueError when nothing is left of set `name`."""
        if not self.kept:
            raise ValueError(
                f"set {name!r} is empty: {self.rows} rows read; {self.left_out() or 'the source has none'}"
            )


def parse_rows(
    rows: Iterable[Row], parse: Callable[[Row], Parsed | None], on_bad_row: OnBadRow, counts: SetCounts
) -> list[tuple[Row, Parsed]]:
    """Every usable row with what `parse` made of it.

    Args:
        rows: from `read_rows`.
        parse: raises RowError where the row cannot be used; None is a row that is not wanted.
        on_bad_row: "error" stops at the first bad row, "skip" counts it in `counts`.
        counts: counted in place.

    Raises:
        ValueError: a bad row, by name, under "error".
    """
    parsed = []
    for row in rows:
        counts.rows += 1
        try:
            if row.problem:
                raise RowError(row.problem)
            made = parse(row)
            if made is None:
                counts.unwanted += 1
            else:
                parsed.append((row, made))
        except RowError as error:
            refuse(row, error, on_bad_row, counts)
    return parsed


def refuse(row: Row, error: Exception, on_bad_row: OnBadRow, counts: SetCounts) -> None:
    """Raises for a bad row, or counts it."""
    if on_bad_row == "error":
        raise ValueError(f"{row.where}: {error} (data.on_bad_row=skip leaves such rows out)") from error
    counts.bad += 1
    counts.first_problem = counts.first_problem or f"{row.where}: {error}"


def column(row: Row, key: str) -> Any:
    """The value of a column; a dotted key reaches into it where no column has that very name.

    Raises:
        RowError: no such column, or it is null.
    """
    value: Any = row.columns
    if key in value:
        value = value[key]
    else:
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise RowError(f"no column {key!r}; the row has {', '.join(map(str, row.columns)) or 'none'}")
            value = value[part]
    if value is None or value != value:  # NaN is how tables write a missing number
        raise RowError(f"column {key!r} is null")
    return value


def text_column(row: Row, key: str) -> str:
    """A column as text; numbers are written out.

    Raises:
        RowError: missing, null, another type, or no proper Unicode.
    """
    value = column(row, key)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(f"column {key!r} is a {type(value).__name__}; expected text or a number")
    if isinstance(value, str) and not is_encodable(value):
        raise RowError(f"column {key!r} is no proper Unicode (a lone surrogate)")
    return str(value)


def encode_rows(
    encode: Callable[[Sequence[str]], list[list[int]]],
    texts: Sequence[tuple[Row, str]],
    on_bad_row: OnBadRow,
    counts: SetCounts,
) -> list[list[int] | None]:
    """Token ids of each row's text, None for a skipped row.

    Raises:
        ValueError: the tokenizer cannot write a row's text (a character outside its alphabet), under "error".
    """
    try:
        return list(encode([text for _, text in texts]))
    except Exception:  # tokenizers raises bare Exceptions that do not say which row; find it
        return [_encode_one(encode, row, text, on_bad_row, counts) for row, text in texts]


def _encode_one(
    encode: Callable[[Sequence[str]], list[list[int]]], row: Row, text: str, on_bad_row: OnBadRow, counts: SetCounts
) -> list[int] | None:
    try:
        return encode([text])[0]
    except Exception as error:
        refuse(row, RowError(f"the tokenizer cannot write {text[:80]!r}: {error}"), on_bad_row, counts)
        return None


def load_prompts(
    name: str,
    config: SetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template | None = None,
    max_prompt_tokens: int = 1024,
    on_bad_row: OnBadRow = "error",
    default_split: str = "train",
) -> tuple[list[Prompt], SetCounts]:
    """The prompts of one set, in the order of the source, and what became of its rows.

    Args:
        name: of the set; a prompt's uid is "<name>/<row number in the source>".
        config: the set.
        tokenizer: of the student.
        template: used where the set has none of its own.
        max_prompt_tokens: longer prompts are dropped and counted.
        on_bad_row: "error" or "skip".
        default_split: split of a procedural task whose config names none.

    Raises:
        ValueError: a bad source, setting or row, or no prompt is left; the message names it.
    """
    renderer = Renderer(config.template or template or Template(), tokenizer)
    pattern = _compile(config.answer_pattern)
    counts = SetCounts(limit=f"max_prompt_tokens={max_prompt_tokens}")
    keep = [key for key in (config.prompt_column, config.answer_column, config.teacher_column) if key]
    if config.teacher is not None and config.teacher_column is not None:
        raise ValueError(f"set {name!r} has both teacher and teacher_column; the column names one per row: keep one")

    def parse(row: Row) -> tuple[str, str | None, str | None]:
        text = renderer.render(column(row, config.prompt_column))
        teacher = config.teacher if config.teacher_column is None else text_column(row, config.teacher_column)
        return text, _answer(row, config.answer_column, pattern), teacher

    parsed = parse_rows(read_rows(config, default_split, keep), parse, on_bad_row, counts)
    encoded = encode_rows(renderer.encode, [(row, text) for row, (text, *_) in parsed], on_bad_row, counts)
    prompts = []
    for (row, (text, answer, teacher)), ids in zip(parsed, encoded, strict=True):
        if ids is None:
            continue
        if not ids:
            refuse(row, RowError("the prompt has no tokens"), on_bad_row, counts)
        elif len(ids) > max_prompt_tokens:
            counts.too_long += 1
        else:
            others = {
                key: value
                for key, value in row.columns.items()
                if key not in keep and (config.columns is None or key in config.columns)
            }
            prompts.append(Prompt(f"{name}/{row.number}", text, tuple(ids), answer, name, others, teacher))
    counts.kept = len(prompts)
    counts.check(name)
    return prompts, counts


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"answer_pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise ValueError(f"answer_pattern {pattern!r} has no group; put the answer in parentheses, as in '#### (.+)'")
    return compiled


def _answer(row: Row, key: str | None, pattern: re.Pattern[str] | None) -> str | None:
    if key is None:
        return None
    text = text_column(row, key)
    if pattern is None:
        return text
    match = pattern.search(text)
    if match is None or match.group(1) is None:
        raise RowError(f"answer_pattern {pattern.pattern!r} finds nothing in column {key!r}")
    return match.group(1).strip()
