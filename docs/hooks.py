"""The pages are written for a repository's browser; this changes what MkDocs would read otherwise.

Links out of docs/ become their text, fences lose the words after their language (a file name is shown above), and
anchors are named as in the repository.
"""

from __future__ import annotations

import re
from typing import Any

_OUT = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)\s]+)\)")
_FENCE = re.compile(r"^(```\w+) +(\S.*)$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Headings get the anchors that links to them use."""
    config["mdx_configs"].setdefault("toc", {})["slugify"] = slug
    return config


def slug(title: str, separator: str) -> str:
    """Small letters, digits and dashes of any script."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", separator)


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """A page before it is read."""
    return _FENCE.sub(_fence, _OUT.sub(_text, markdown))


def _text(link: re.Match) -> str:
    text, path = link.groups()
    return text if text.strip("`") in path else f"{text} (`{path}`)"


def _fence(opening: re.Match) -> str:
    fence, words = opening.groups()
    return f"`{words}`\n\n{fence}" if "." in words else fence
