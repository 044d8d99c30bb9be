"""Which rows a page shows: the best and worst, those that changed most, those where teacher and student disagree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from kdrl_pl.report.run import Rows, Run
from kdrl_pl.report.tokens import Objective

Row = Mapping[str, Any]
_CHANGES = 4  # problems shown early and late


@dataclass(frozen=True)
class Change:
    """The same problem early and late.

    Args:
        early, late: rows.
        when: rollouts done before each.
        alike: 0 … 1, how much of the texts is the same.
        pieces: of the later text, each with whether it was not there before.
    """

    early: Row
    late: Row
    when: tuple[int, int]
    alike: float
    pieces: Sequence[tuple[str, bool]]


def best_and_worst(rows: Rows, count: int = 3) -> tuple[Rows, Rows]:
    """Rows with the highest and the lowest reward, at most one per prompt; among equals the teacher decides.

    Args:
        rows: of one rollout.
        count: of each.
    """
    judged = [row for row in rows if row["reward"] is not None]  # null: it was not finite
    ordered = sorted(judged, key=lambda row: (-row["reward"], -_teacher_mean(row)))
    best = _one_per_prompt(ordered)[:count]
    shown = {id(row) for row in best}
    worst = _one_per_prompt(ordered[::-1])
    return best, [row for row in worst if id(row) not in shown][:count]


def changes(run: Run) -> list[Change]:
    """Some problems early and late, those whose verdict changed first, then by how little of the text is the same.

    They come from the first and the newest validation, where every problem is sampled with the same random numbers; a
    run without validation may have drawn a prompt twice in the rollouts it keeps.
    """
    if len(run.samples) > 1:
        times = (min(run.samples), max(run.samples))
        early, late = ({row["uid"]: row for row in reversed(run.samples[time]["rows"])} for time in times)
        pairs = [(early[uid], late[uid], times) for uid in early if uid in late]
    else:
        seen: dict[str, list[tuple[int, Row]]] = {}
        for rollout in _ends(run.stored(), 16):
            for row in _one_per_prompt(run.rows(rollout)):
                seen.setdefault(row["uid"], []).append((rollout, row))
        pairs = [(v[0][1], v[-1][1], (v[0][0], v[-1][0])) for v in seen.values() if len(v) > 1]
    made = [_change(*pair) for pair in pairs[:200]]
    changed = [change for change in made if change.early["completion"] != change.late["completion"]]
    return sorted(changed, key=lambda c: (c.early["correct"] == c.late["correct"], c.alike))[:_CHANGES]


def _change(early: Row, late: Row, when: tuple[int, int]) -> Change:
    """Compared letter by letter where the texts are short, word by word where that would take long."""
    texts = [row["completion"] for row in (early, late)]
    short = max(map(len, texts)) <= 300
    a, b = (list(text) if short else re.findall(r"\w+|\W", text)[:600] for text in texts)
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    pieces = [("".join(b[j:k]), kind != "equal") for kind, _, _, j, k in matcher.get_opcodes() if k > j]
    rest = texts[1][sum(len(piece) for piece, _ in pieces) :]
    return Change(early, late, when, matcher.ratio(), [*pieces, (rest, False)])


def most_disputed(rows: Rows, count: int = 4) -> list[int]:
    """Numbers of the rows where teacher and student disagree most, right and wrong ones by turns, one per prompt.

    Args:
        rows: of one rollout.
        count: at most.
    """
    scored = [i for i, row in enumerate(rows) if disagreement_of(row) > 0]
    scored.sort(key=lambda i: -disagreement_of(rows[i]))
    chosen: list[int] = []
    for verdict in (False, True):
        uids: set[str] = set()
        for i in scored:
            if rows[i]["correct"] == verdict and rows[i]["uid"] not in uids and len(uids) < count // 2:
                uids.add(rows[i]["uid"])
                chosen.append(i)
    return sorted(chosen, key=lambda i: -disagreement_of(rows[i]))


def disagreement_of(row: Row) -> float:
    """Mean of |teacher − student| over the tokens that the teacher was asked about, in nats."""
    student, teacher = row.get("old_logprobs") or row.get("behavior_logprobs"), row.get("teacher_logprobs")
    weights = row.get("kd_weights") or [1] * len(teacher or [])
    gaps = [
        abs(t - s)
        for t, s, w in zip(teacher or [], student or [], weights, strict=False)
        if w and t is not None and s is not None
    ]
    return sum(gaps) / len(gaps) if gaps else 0.0


def objective_at(run: Run, rollout: int) -> Objective:
    """What the distillation of the run was in that rollout."""
    settings = ((run.config.get("model") or {}).get("distillation") or {}).get("init_args") or {}
    row = next((row for row in run.training if row.get("rollout") == rollout), {})
    known = {name: settings[name] for name in ("estimator", "transform", "transform_bound") if name in settings}
    return Objective(coef=row.get("train/kd_coef"), **known)


def _teacher_mean(row: Row) -> float:
    values = [value for value in row.get("teacher_logprobs") or [] if value is not None]
    return sum(values) / len(values) if values else 0.0


def _one_per_prompt(rows: Sequence[Row]) -> Rows:
    first: dict[str, Any] = {}
    for row in rows:
        first.setdefault(row["uid"], row)
    return list(first.values())


def _ends(numbers: list[int], count: int) -> list[int]:
    """The first and the last of a long list, in order."""
    return numbers if len(numbers) <= 2 * count else [*numbers[:count], *numbers[-count:]]
