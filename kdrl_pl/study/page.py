"""Fills marked blocks of a Markdown page with the tables of a study; what stands around them is for people to write.

<!-- study:evidence table arithmetic -->
<!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kdrl_pl.study.config import unknown


def fill(page: str, study: str, blocks: Mapping[str, str]) -> str:
    """The page with every block of `study` replaced; blocks of other studies stay.

    Args:
        page: Markdown.
        study: its name.
        blocks: "table arithmetic" and the like -> Markdown without a newline at the end.

    Raises:
        ValueError: the page has no block of this study, a block is not known, or has no end.
    """
    mark = re.compile(
        rf"(<!-- study:{re.escape(study)} +([^\n]*?) *-->\n)(.*?)(<!-- end -->|<!-- study:|\Z)", re.DOTALL
    )

    def replaced(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if end != "<!-- end -->":
            raise ValueError(f"the block {start.strip()} has no <!-- end --> of its own")
        if name not in blocks:
            raise ValueError(f"{start.strip()}: {unknown('block', name, blocks)}")
        return f"{start}{blocks[name]}\n{end}"

    filled, count = mark.subn(replaced, page)
    if not count:
        example = f"<!-- study:{study} {next(iter(blocks))} -->\n<!-- end -->"
        raise ValueError(f"there is no block of study {study} to fill; expected lines like\n{example}")
    return filled
