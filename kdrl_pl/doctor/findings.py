"""What the doctor says: one line per thing looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line.

    Args:
        state: "ok"; "warn", which may be meant; "fail", with which a run cannot go well.
        what: was looked at.
        text: what was seen.
        cure: what to do about it, for warn and fail.
    """

    state: Literal["ok", "warn", "fail"]
    what: str
    text: str
    cure: str = ""


def ok(what: str, text: str) -> Finding:
    return Finding("ok", what, text)


def warn(what: str, text: str, cure: str) -> Finding:
    return Finding("warn", what, text, cure)


def fail(what: str, text: str, cure: str) -> Finding:
    return Finding("fail", what, text, cure)
