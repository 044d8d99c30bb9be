"""One row of a rollout in the terminal, its tokens coloured by teacher–student disagreement.

Without colours (NO_COLOR, a file, a pipe) signs say the same: `7[--]` is a token that the teacher likes less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from kdrl_pl.report.completions import disagreement_of
from kdrl_pl.report.run import Rows
from kdrl_pl.report.tokens import LEVELS, Token, facts
from kdrl_pl.text import printable

if TYPE_CHECKING:
    from rich.console import Console

# level -> style; black on light grounds and white on dark ones are readable on any terminal background
_STYLES = {
    -4: "black on #ee8246",
    -3: "black on #f5a673",
    -2: "black on #fbd0b0",
    -1: "#b86a2e",
    1: "#3f86c9",
    2: "black on #bfdcf7",
    3: "black on #8cc0ef",
    4: "black on #5aa5e8",
}
_SHOWN = 12  # rows of the table


def console(file: IO[str] | None = None) -> Console:
    """Where `kdrl inspect` writes; it has no colours where NO_COLOR is set or no one would see them.

    Lines are not wrapped here: a terminal does that itself, and in a file or a pipe they are wanted whole.
    """
    from rich.console import Console

    return Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)


def show_row(row: dict[str, Any], number: int, tokens: Sequence[Token], out: Console) -> None:
    """Print one row: facts, prompt, response, and its strongest disagreements as a table."""
    from rich.text import Text

    colours = out.color_system is not None and not out.no_color
    verdict = "right" if row["correct"] else "wrong"
    told = ", ".join([verdict, *facts(row, tokens)])
    out.print(printable(f"rollout {row['rollout'] + 1}, row {number}: {row['uid']}, {told}"))
    out.print(_legend(colours))
    out.print()
    out.print(Text(printable(row["prompt"]), style="dim"))
    response = Text()
    masked = bool(tokens) and all(token.masked for token in tokens)  # said already
    for token in tokens:
        text = printable(token.text) or "·"
        if colours:
            response.append(text, style=style_of(token))
        else:
            response.append(text if masked else text + signs(token))
    out.print(response)
    out.print()
    strongest = sorted(
        (pair for pair in enumerate(tokens) if pair[1].d is not None and abs(pair[1].d) >= LEVELS[0]),
        key=lambda pair: -abs(pair[1].d or 0.0),
    )
    for place, token in strongest[:10]:
        out.print(Text(f"{place + 1:>5}  {printable(token.text)!r:<14} {token.words()}"))


def style_of(token: Token) -> str:
    """The style of a token: colour by `d`, underlined where reward and teacher clash, dim where it is not distilled."""
    words = [_STYLES.get(token.level, "")]
    words += [name for name, holds in (("dim", token.masked), ("underline", token.clash)) if holds]
    return " ".join(filter(None, words))


def signs(token: Token) -> str:
    """The same as signs behind the token; nothing where there is nothing to say.

    >>> signs(Token("7", -0.5, -2.5, False, 1.0, -0.6))
    '[---!]'
    """
    text = ("+" if token.level > 0 else "-") * abs(token.level)
    text += "~" * bool(token.masked) + "!" * token.clash
    return f"[{text}]" if text else ""


def _legend(colours: bool) -> Any:
    from rich.text import Text

    if not colours:
        return Text("[-] [--] [---] [----] the teacher likes the token less, [+] … more; ! clash; ~ not distilled")
    legend = Text("the teacher likes it ")
    for level in (-4, -2, 2, 4):
        legend.append(f" {abs(level) // 2 * ('-' if level < 0 else '+')} ", style=_STYLES[level])
    legend.append("  less … more; ")
    legend.append("clash", style="underline")
    legend.append(" of reward and teacher; ")
    legend.append("not distilled", style="dim")
    return legend


def show_rows(rows: Rows, out: Console) -> None:
    """Print the rows of a rollout as a table, those with the strongest disagreement first."""
    from rich.text import Text

    order = sorted(range(len(rows)), key=lambda i: -disagreement_of(rows[i]))
    out.print(Text(f"{'row':>5}  {'mean |d|':>8}  {'verdict':<7}  {'reward':>7}  {'tokens':>6}  prompt"))
    for i in order[:_SHOWN]:
        row = rows[i]
        reward = "none" if row["reward"] is None else f"{row['reward']:.3g}"
        prompt = printable(row["prompt"]).replace("\n", " ")[-40:]
        verdict = "right" if row["correct"] else "wrong"
        numbers = f"{reward:>7}  {len(row['response_ids']):>6}"
        out.print(Text(f"{i:>5}  {disagreement_of(row):>8.3f}  {verdict:<7}  {numbers}  {prompt}"))
    if len(rows) > _SHOWN:
        out.print(Text(f"… and {len(rows) - _SHOWN} rows more; --row shows any of them"))
