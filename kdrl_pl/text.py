"""Text that a model wrote, made safe to print."""

from __future__ import annotations

import re
import unicodedata

# What a terminal or a viewer acts on: controls, format characters (which turn the direction of text around), halves of
# surrogate pairs. Newline and tab stay.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SUSPECT = re.compile(r"[^\x20-\x7e\n\t]")


def printable(text: str) -> str:
    r"""`text` with every control character written as an escape: it cannot move the cursor, hide or recolour anything.

    >>> printable("\x1b[2J12\n")
    '\\x1b[2J12\n'
    """
    return _SUSPECT.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
