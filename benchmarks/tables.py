"""Writes the tables of the pages from `benchmarks/results/`, so that no figure is copied by hand.

    python benchmarks/tables.py [--page FILE] [--results benchmarks/results]

A table stands between `<!-- NAME -->` and `<!-- end -->` and is made of NAME.json; without that file it stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from common.markdown import TABLES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs/performance.md", ROOT / "docs/scaling.md"]
PLACE = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(page: str, results: Path) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: a table is named that no benchmark makes.
    """

    def replaced(match: re.Match[str]) -> str:
        name, file = match[1], results / f"{match[1]}.json"
        if name not in TABLES:
            raise ValueError(f"no benchmark makes a table {name!r}; expected one of {', '.join(TABLES)}")
        if not file.is_file():
            return match[0]
        return f"<!-- {name} -->\n\n{TABLES[name](json.loads(file.read_text()))}\n\n<!-- end -->"

    return PLACE.sub(replaced, page)


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="default: all pages with such tables")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(arguments)
    for page in PAGES if options.page is None else [options.page]:
        page.write_text(filled(page.read_text(), options.results))


if __name__ == "__main__":
    main()
