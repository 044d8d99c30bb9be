"""`kdrl compare RUN RUN ...`."""

from __future__ import annotations

from pathlib import Path

from kdrl_pl.cli.errors import Parser


def main(command: str, arguments: list[str]) -> None:
    """Lay several runs over each other: a table here, and with --output a page with their curves."""
    parser = Parser(prog="kdrl compare", description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, at least two")
    parser.add_argument("--output", type=Path, help="HTML file to write, such as compare.html")
    options = parser.parse_args(arguments)

    from kdrl_pl.report.compare import comparable, compare_page, compare_text
    from kdrl_pl.report.page import write_page
    from kdrl_pl.report.run import read_run

    runs = comparable([read_run(folder) for folder in options.runs])
    print(compare_text(runs))
    if options.output:
        write_page(options.output, compare_page(runs))
        print(f"\nwrote {options.output}")
