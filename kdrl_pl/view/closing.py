"""What a person reads when a run is over: what it learned, where things are, what to do next."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl_pl.text import printable
from kdrl_pl.view.state import duration

# metric of a validation set -> its name, how it is written, its difference in units, and their name
_LEARNED = {
    "avg_at_k": ("accuracy", "{:.1%}", 100, "{:+.1f} points"),
    "maj_at_k": ("majority", "{:.1%}", 100, "{:+.1f} points"),
    "length": ("length", "{:.0f}", 1, "{:+.0f} tokens"),
    "truncated": ("cut off", "{:.1%}", 100, "{:+.1f} points"),
    "kl_teacher": ("KL to teacher", "{:.3f}", 1, "{:+.3f} nats"),
}


def closing(folder: Path) -> str:
    """The closing lines of a run, from the files it left.

    Args:
        folder: with summary.json, and perhaps alarms.jsonl and checkpoints/best.json.
    """
    summary = json.loads((folder / "summary.json").read_text())
    rollouts, seconds, tokens = summary["rollouts"], summary["seconds"], summary["tokens"]
    lines = [f"{rollouts} rollouts in {duration(seconds)}, {tokens:,} tokens sampled", ""]
    lines += learned(summary["val"]["before"], summary["val"]["after"])
    lines += ["", f"alarms:     {_alarms(folder / 'alarms.jsonl')}", f"run folder: {folder}"]
    best = folder / "checkpoints" / "best.json"
    if best.exists():
        lines.append(f"best:       {best.parent / json.loads(best.read_text())['file']}")
    page = folder / "report.html"
    if page.exists():
        lines.append(f"report:     {page}")
    lines.append(f"next:       kdrl export {folder}")
    return printable("\n".join(lines))


def learned(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    """Per validation set what changed; only what it is now where nothing was measured before."""
    rows = []
    for name, now in after.items():
        then = (before or {}).get(name, {})
        for metric, (word, form, scale, change) in _LEARNED.items():
            value, old = now.get(metric), then.get(metric)
            if value is None or (metric == "truncated" and not value and not old):
                continue
            was = "" if old is None else f"{form.format(old)} → "
            more = "" if old is None else f"  ({_signed(change.format(scale * (value - old)))})"
            rows.append((name, word, f"{was}{form.format(value)}{more}"))
            name = ""
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return [f"{name:<{widths[0]}}  {word:<{widths[1]}}  {text}".rstrip() for name, word, text in rows]


def _signed(text: str) -> str:
    """A difference whose digits are all zeros is not below zero."""
    return text if any(digit in text for digit in "123456789") else text.replace("-", "+")


def _alarms(file: Path) -> str:
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines:
        return "none"
    codes = list(dict.fromkeys(json.loads(line)["code"] for line in lines))
    return f"{', '.join(codes)} (alarms.jsonl; docs/troubleshooting.md says what to do)"


def say(text: str) -> None:
    """Print closing lines, between two rules on a terminal, as they are anywhere else."""
    if sys.stdout.isatty():
        rule = "─" * min(shutil.get_terminal_size().columns - 1, 78)
        text = f"{rule}\n{text}\n{rule}"
    print(text.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"), flush=True)
