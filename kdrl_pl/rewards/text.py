"""What a rule reads in a completion: the last box, the text after a marker, a text without layout."""

from __future__ import annotations

import re
import unicodedata

from kdrl_pl.rewards.base import CannotJudge, Completion

_BOX = re.compile(r"\\boxed(?![A-Za-z])\s*")
_TAG = re.compile(r"<([A-Za-z][\w-]*)>")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`; None when there is none, or the last one is empty or never closed.

    Only the last box counts, so that a list of guesses is worth one guess: after an unfinished box the text has no
    answer, whatever was boxed before it. Braces must balance; escaped ones (`\{`, `\}`) are not braces.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start : start + 1] != "{":
        return None
    depth, i = 0, start
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1 : i].strip() or None
        i += 1
    return None


def after_marker(text: str, marker: str) -> str | None:
    r"""What follows the last `marker`, up to the end of that line; None when the marker or the text is missing.

    Line breaks between marker and text are skipped (`"Answer:\n72"`). A marker that is a tag, such as `<answer>`,
    ends at its closing tag instead, and without one there is no answer.
    """
    _, found, rest = text.rpartition(marker)
    if not found:
        return None
    if tag := _TAG.fullmatch(marker):
        content, closed, _ = rest.partition(f"</{tag[1]}>")
        return content.strip() or None if closed else None
    lines = rest.strip().splitlines()
    return lines[0].strip() if lines else None


def normalize(text: str, ignore_case: bool = False) -> str:
    """The text as exact match compares it: NFC, white space as single spaces, ends stripped, by choice casefolded."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if ignore_case else text


def reference_answer(completion: Completion, marker: str | None = None) -> str:
    """The reference answer of the completion's prompt, or the part of it after `marker`.

    Raises:
        CannotJudge: the row has no answer, or its answer lacks the marker.
    """
    answer, uid = completion.prompt.answer, completion.prompt.uid
    if answer is None:
        raise CannotJudge(
            f"row {uid!r} has no reference answer, which this reward compares with; name the data set's answer column,"
            " or take a reward that needs none"
        )
    if marker is None:
        return answer
    if (found := after_marker(answer, marker)) is None:
        raise CannotJudge(
            f"the reference answer of row {uid!r} has nothing after answer_marker={marker!r}: {answer[-80:]!r}"
        )
    return found
