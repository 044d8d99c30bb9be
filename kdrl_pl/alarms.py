"""Alarms: what goes wrong in a run, read from its metrics, in plain words; docs/troubleshooting.md has each code.

An alarm is a pure function of the rows of metrics.jsonl up to now, so a resumed run raises the same ones at the same
rollouts as one that was never stopped. It is raised once, and again only after it has been gone for `WINDOW` rollouts.
The thresholds are choices of ours; docs/troubleshooting.md says what they did to the runs of docs/evidence.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

WINDOW = 10  # rollouts that a mean is taken over; before that many, nothing is said (but of skipped steps)


@dataclass(frozen=True)
class Alarm:
    """One row of alarms.jsonl.

    Args:
        rollout: the one after which it was raised, counted from 0.
        code: K001 and so on; the section of docs/troubleshooting.md.
        message: what was seen, with the numbers.
        cure: what to do about it.
    """

    rollout: int
    code: str
    message: str
    cure: str

    def row(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}. {self.cure}"


class History:
    """The metrics so far: a row per rollout and a row per validation, numbers that are not finite left out."""

    def __init__(self) -> None:
        self.rollouts: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """One row as metrics.jsonl has it."""
        numbers = {name: float(v) for name, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        (self.validations if "validation" in row else self.rollouts).append(numbers)

    def mean(self, name: str, ago: int = 0) -> float | None:
        """Mean over the `WINDOW` rollouts that end `ago` rollouts before the newest one.

        None where there are not so many, or where fewer than half of them have the metric.
        """
        end = len(self.rollouts) - ago
        if end < WINDOW:
            return None
        return _mean(self.rollouts[end - WINDOW : end], name)

    def first(self, name: str) -> float | None:
        """Mean over the first `WINDOW` rollouts, once there are twice as many."""
        return _mean(self.rollouts[:WINDOW], name) if len(self.rollouts) >= 2 * WINDOW else None

    def last(self, name: str, ago: int = 0) -> float | None:
        """The value of one rollout; None where it lacks it."""
        return self.rollouts[-1 - ago].get(name) if ago < len(self.rollouts) else None


def _mean(rows: list[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return math.fsum(values) / len(values) if 2 * len(values) >= WINDOW else None


Said = tuple[str, str]  # message, cure


def no_signal(history: History) -> Said | None:
    """K001"""
    share, coef = history.mean("rollout/groups_no_signal"), history.last("train/pg_coef")
    if share is None or share < 0.96 or not coef:
        return None
    right = history.mean("rollout/groups_all_correct") or 0.0
    cure = (
        "The prompts are too easy: take harder ones, or data.curriculum"
        if right > 0.5
        else "The prompts are too hard, or the reward cannot read the answers: look at rollouts/; take easier prompts, "
        "a larger rollout.group_size, or distil first (configs/arms/opd_then_rl.yaml)"
    )
    wrong = history.mean("rollout/groups_all_wrong") or 0.0
    return (
        f"in {share:.0%} of the groups of the last {WINDOW} rollouts all responses got the same reward "
        f"({right:.0%} all right, {wrong:.0%} all wrong), from which reinforcement learning learns nothing",
        cure,
    )


def leaving_the_teacher(history: History) -> Said | None:
    """K002"""
    now, then = history.mean("teacher/reverse_kl"), history.mean("teacher/reverse_kl", ago=WINDOW)
    if now is None or then is None or not history.last("train/kd_coef") or now - then < 0.1 or now < 1.5 * then:
        return None
    return (
        f"the KL to the teacher rose from {then:.3g} to {now:.3g} nats per token within {2 * WINDOW} rollouts",
        "Bound the teacher's log-ratio (model.distillation.transform: clip), lower the learning rate, or see whether "
        "reward and teacher want different things (train/sign_conflict)",
    )


def truncated(history: History) -> Said | None:
    """K003"""
    share = history.mean("rollout/truncated")
    if share is None or share < 0.3:
        return None
    return (
        f"{share:.0%} of the responses of the last {WINDOW} rollouts ran out of tokens before they ended",
        "Raise rollout.sampling.max_tokens; if the responses ramble or repeat themselves, see K007, and that the "
        "template ends where an answer begins (kdrl doctor shows it)",
    )


def entropy_collapse(history: History) -> Said | None:
    """K004"""
    now, first = history.mean("rollout/entropy"), history.first("rollout/entropy")
    if now is None or first is None or now > 0.05 or now > 0.1 * first or (history.mean("reward/correct") or 0) > 0.9:
        return None
    return (
        f"the entropy fell from {first:.3g} to {now:.2g} nats per token: the student hardly tries anything any more",
        "Lower the learning rate, raise model.policy_gradient.clip_high or use configs/arms/dapo.yaml; keep some "
        "distillation, whose full form (distillation.estimator: full) still pulls on words that are never sampled",
    )


def teacher_against_reward(history: History) -> Said | None:
    """K005"""
    share, distilled = history.mean("train/sign_conflict"), history.mean("teacher/kd_tokens")
    if share is None or share < 0.6:
        return None
    if distilled is not None and distilled < 0.95:  # a mask by the outcome disagrees with the reward by its choice
        return None
    return (
        f"on {share:.0%} of the tokens of the last {WINDOW} rollouts the teacher pulls against the reward; by chance "
        "it would be half: on these prompts it may be no better than the student",
        "Measure it: kdrl validate --rollout.policy teacher. If it is worse, lower model.distillation.coef, let it "
        "fade, or distil only where the teacher is right (configs/arms/competence_gate.yaml)",
    )


def sampler_drift(history: History) -> Said | None:
    """K006"""
    now, first = history.mean("rollout/sampler_drift_mean"), history.first("rollout/sampler_drift_mean")
    if now is None or first is None or now < 1e-3 or now < 3 * first:
        return None
    return (
        f"sampler and trainer drift apart: {now:.2g} nats per token on average, {first:.2g} in the first rollouts",
        "Sample in the dtype that is trained (rollout.engine.init_args.dtype: null), or set model.importance_cap: 2.0 "
        "so that the difference is made good",
    )


def longer_without_gain(history: History) -> Said | None:
    """K007"""
    now, then = history.mean("rollout/length"), history.mean("rollout/length", ago=WINDOW)
    right, before = history.mean("reward/correct"), history.mean("reward/correct", ago=WINDOW)
    if None in (now, then, right, before) or now < 1.5 * then or right > before:
        return None
    return (
        f"responses grew from {then:.0f} to {now:.0f} tokens within {2 * WINDOW} rollouts and are right no more often "
        f"({before:.0%} before, {right:.0%} now)",
        "A far teacher does this: bound it (model.distillation.transform: clip); else penalise length "
        "(kdrl_pl.rewards.SoftOverlong) or use model.normaliser: token",
    )


def skipped_steps(history: History) -> Said | None:
    """K008"""
    now = history.last("train/skipped_steps")
    before = history.last("train/skipped_steps", ago=WINDOW) or 0.0
    if now is None or now - before < 3:
        return None
    return (
        f"{now - before:.0f} optimizer steps were skipped within {min(WINDOW, len(history.rollouts))} rollouts",
        "Where no row carried a signal see K001; where a number was not finite (a warning says so) lower the learning "
        "rate and look at nonfinite/ in the run folder",
    )


def teacher_dwarfs_reward(history: History) -> Said | None:
    """K009"""
    ratio = history.mean("train/kd_to_rl")
    if ratio is None or ratio < 10:
        return None
    return (
        f"the teacher's pull is {ratio:.0f} times that of the reward: this is distillation with hardly any "
        "reinforcement learning",
        "Lower model.distillation.coef, or bound it (model.distillation.transform: clip); if groups without signal are "
        "the reason, see K001",
    )


def unreadable(history: History) -> Said | None:
    """K010"""
    unread, failed = history.mean("reward/unparsable") or 0.0, history.mean("reward/errors") or 0.0
    if unread < 0.5 and failed < 0.05:
        return None
    what = (
        f"in {unread:.0%} of the responses of the last {WINDOW} rollouts the reward found no answer to read"
        if unread >= 0.5
        else f"the reward failed on {failed:.0%} of the responses of the last {WINDOW} rollouts"
    )
    return (
        what,
        "Compare rollouts/ with the form the reward expects; say the form in data.template.text, show it in "
        "data.template.few_shot, or raise rollout.sampling.max_tokens if responses are cut off before it (K003)",
    )


def worse_than_its_best(history: History) -> Said | None:
    """K011"""
    scores = [row["val/avg_at_k"] for row in history.validations if "val/avg_at_k" in row]
    if not scores or max(scores) - scores[-1] < 0.1:
        return None
    return (
        f"validation accuracy is {scores[-1]:.1%}; it has been {max(scores):.1%}",
        "The best checkpoint is kept: kdrl export takes it. To go on from there, resume that file with a lower "
        "learning rate",
    )


RULES: dict[str, Callable[[History], Said | None]] = {
    "K001": no_signal,
    "K002": leaving_the_teacher,
    "K003": truncated,
    "K004": entropy_collapse,
    "K005": teacher_against_reward,
    "K006": sampler_drift,
    "K007": longer_without_gain,
    "K008": skipped_steps,
    "K009": teacher_dwarfs_reward,
    "K010": unreadable,
    "K011": worse_than_its_best,
}
_OF_VALIDATION = {"K011"}  # judged when a validation is over, the others when a rollout is


class Alarms:
    """Listens to the rows of metrics.jsonl, in their order."""

    def __init__(self) -> None:
        self._history = History()
        self._seen: dict[str, int] = {}  # code -> last rollout at which its rule held

    def observe(self, row: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that this row raises.

        Args:
            row: of a rollout, or of a validation (which has the key "validation"); `rollout` is its number.
        """
        self._history.add(row)
        rollout, raised = int(row["rollout"]), []
        for code, rule in RULES.items():
            if (code in _OF_VALIDATION) != ("validation" in row):
                continue
            said = rule(self._history)
            if said is None:
                continue
            if self._is_new(code, rollout):
                raised.append(Alarm(rollout, code, *said))
            self._seen[code] = rollout
        return raised

    def _is_new(self, code: str, rollout: int) -> bool:
        if code in _OF_VALIDATION:  # rare, so one validation without it is enough
            before = [int(row["rollout"]) for row in self._history.validations[:-1]]
            return code not in self._seen or not before or self._seen[code] < before[-1]
        return code not in self._seen or rollout - self._seen[code] > WINDOW
