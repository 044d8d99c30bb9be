"""`kdrl report RUN`."""

from __future__ import annotations

from pathlib import Path

from kdrl_pl.cli.errors import Parser


def main(command: str, arguments: list[str]) -> None:
    """Write the report of a run as one HTML file; works while the run goes on, too."""
    parser = Parser(prog="kdrl report", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html in the run folder)")
    options = parser.parse_args(arguments)

    from kdrl_pl.report.decoding import decoder_of
    from kdrl_pl.report.page import write_report
    from kdrl_pl.report.run import read_run

    decode = decoder_of(run) if (run := read_run(options.run)).stored() else None
    output = write_report(options.run, options.output, decode)
    print(f"wrote {output}, {output.stat().st_size / 1000:,.0f} kB")
