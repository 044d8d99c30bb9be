"""`kdrl inspect RUN`."""

from __future__ import annotations

from pathlib import Path

from kdrl_pl.cli.errors import Parser


def main(command: str, arguments: list[str]) -> None:
    """Show a stored rollout token by token: where the teacher disagrees, and which way it and the reward pull.

    Raises:
        FileNotFoundError: the run keeps no rollouts.
        ValueError: it does not keep this rollout, or the rollout has no such row.
    """
    parser = Parser(prog="kdrl inspect", description=main.__doc__.partition("Raises:")[0].strip())
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--rollout", type=int, help="number of the rollout, from 1 (default: the newest that is stored)"
    )
    parser.add_argument(
        "--row", type=int, help="number of the row (default: a table of all, and the most disputed one)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    options = parser.parse_args(arguments)

    from kdrl_pl.report.completions import disagreement_of, objective_at
    from kdrl_pl.report.decoding import decoder_of
    from kdrl_pl.report.page import inspect_page, write_page
    from kdrl_pl.report.run import read_run
    from kdrl_pl.report.terminal import console, show_row, show_rows
    from kdrl_pl.report.tokens import tokens_of

    run = read_run(options.run)
    stored = run.stored()
    if not stored:
        raise FileNotFoundError(f"{run.folder} keeps no rollouts; train with --run.keep_rollouts 5 or more")
    number = stored[-1] if options.rollout is None else options.rollout - 1
    rows = run.rows(number)
    if not rows:
        kept = f"{stored[0] + 1} to {stored[-1] + 1}" if len(stored) > 1 else f"{stored[0] + 1}"
        raise ValueError(f"rollout {number + 1} is not stored in {run.folder}; --rollout takes {kept}")
    if options.row is not None and not 0 <= options.row < len(rows):
        raise ValueError(f"--row is {options.row}; rollout {number + 1} has rows 0 to {len(rows) - 1}")
    out = console()
    chosen = options.row
    if chosen is None:
        show_rows(rows, out)
        out.print()
        chosen = max(range(len(rows)), key=lambda i: disagreement_of(rows[i]))
    tokens = tokens_of(rows[chosen], objective_at(run, number), decoder_of(run))
    show_row(rows[chosen], chosen, tokens, out)
    if options.html:
        write_page(options.html, inspect_page(run, rows[chosen], chosen, tokens))
        print(f"\nwrote {options.html}")
