"""Where student and teacher disagree, token by token: `d = teacher - student` in nats, and who pulls which way.

    pull of the reward   the row's advantage: above 0 the token becomes likelier
    pull of the teacher  beta f(d) w_kd / w: how much the distillation adds to that advantage on this token

(METHOD §1: on policy the joint loss has the gradient of the per-token advantage `Â + beta d`.) With the estimators that
sum over words ("full", "top_k") the teacher pulls at every word of the vocabulary; what stands here is its pull on the
word that was sampled. Log-probs are those of the sampler, or of the student before the updates where the row has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEVELS = (0.1, 0.5, 1.5, 4.0)  # nats at which the colour deepens
_WHOLE = 0.01  # a pull below this share of the advantage's unit counts as none

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Objective:
    """What the distillation made of `d` in the rollout of the row.

    Args:
        coef: β of that rollout; None where it is not known.
        estimator, transform, transform_bound: settings of the distillation.
    """

    coef: float | None = None
    estimator: str = "k2"
    transform: str = "none"
    transform_bound: float = 1.0

    def pull(self, d: float) -> float:
        """f(d)."""
        if self.estimator == "forward_kl":
            return math.expm1(min(d, 50.0))
        if self.transform == "clip":
            return max(-self.transform_bound, min(self.transform_bound, d))
        if self.transform == "soft_log":
            return math.copysign(math.log1p(abs(d)), d)
        if self.transform == "tanh":
            return self.transform_bound * math.tanh(d / self.transform_bound)
        return d


@dataclass(frozen=True)
class Token:
    """One token of a response.

    Args:
        text: what it adds to the text; empty for the first bytes of a character.
        student, teacher: log-probs in nats; None where they are not known.
        masked: whether the distillation leaves it out; None where that is not known.
        reward_pull, teacher_pull: see above; None where they are not known.
    """

    text: str
    student: float | None
    teacher: float | None
    masked: bool | None
    reward_pull: float | None
    teacher_pull: float | None

    @property
    def d(self) -> float | None:
        """teacher − student in nats; None where the teacher was not asked."""
        return None if self.student is None or self.teacher is None else self.teacher - self.student

    @property
    def level(self) -> int:
        """−4 … 4: how strongly the teacher disagrees, below 0 where it likes the token less; 0 for less than 0.1 nats.

        >>> Token("a", -0.5, -2.5, False, None, None).level
        -3
        """
        if self.d is None or self.masked:
            return 0
        return int(math.copysign(sum(abs(self.d) >= limit for limit in LEVELS), self.d))

    @property
    def clash(self) -> bool:
        """Whether reward and teacher pull in opposite directions, the teacher noticeably."""
        rl, kd = self.reward_pull, self.teacher_pull
        return rl is not None and kd is not None and rl * kd < 0 and abs(kd) >= _WHOLE

    def words(self) -> str:
        """All of it, for a person."""
        said = []
        if self.d is None:
            said.append("teacher not asked" if self.teacher is None else "student's log-prob not known")
        else:
            said.append(f"d {self.d:+.2f} nats (student {self.student:.2f}, teacher {self.teacher:.2f})")
        if self.reward_pull is not None:
            said.append(f"reward {_direction(self.reward_pull)}")
        if self.masked:
            said.append("not distilled")
        elif self.teacher_pull is not None:
            said.append(f"teacher {_direction(self.teacher_pull)}")
        if self.clash:
            said.append("they clash")
        return "; ".join(said)


def tokens_of(row: Mapping[str, Any], objective: Objective, decode: Decode | None) -> list[Token]:
    """The tokens of one stored row (see `records.rollout_rows`).

    Args:
        row: with `response_ids` and log-probs; `token_weight` and `kd_weights` where it was trained on.
        objective: of its rollout.
        decode: ids to text, special tokens included; None shows ids.
    """
    ids = row["response_ids"]
    student = row.get("old_logprobs") or row.get("behavior_logprobs") or [None] * len(ids)
    teacher = row.get("teacher_logprobs") or [None] * len(ids)
    weights, weight = row.get("kd_weights"), row.get("token_weight")
    tokens = []
    for i, text in enumerate(pieces(ids, decode)):
        masked = None if weights is None else not weights[i]
        asked = None if masked else teacher[i]  # the teacher's zeros stand where it was not asked
        pull = None
        if asked is not None and student[i] is not None and objective.coef is not None and weights and weight:
            pull = objective.coef * objective.pull(asked - student[i]) * weights[i] / weight
        tokens.append(Token(text, student[i], asked, masked, row.get("advantage") if weights else None, pull))
    return tokens


def pieces(ids: Sequence[int], decode: Decode | None) -> list[str]:
    """What every token adds to the text: they join to the decoded whole, whatever the tokenizer does with spaces.

    A character of several tokens stands at the last of them. Each is decoded behind those of the piece before, since
    tokenizers treat the first word of a text in their own way.
    """
    if decode is None:
        return [f"‹{token}›" for token in ids]
    texts = []
    context = done = 0
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[context:done]), decode(ids[context:end])
        if text.endswith("�") and end < len(ids) and end - done < 4:  # bytes of a character that goes on
            texts.append("")
            continue
        texts.append(text[len(before) :])
        context, done = done, end
    return texts


def disagreement(tokens: Sequence[Token]) -> float:
    """Mean of |d| over the tokens that the teacher was asked about, in nats; 0 where there are none."""
    gaps = [abs(token.d) for token in tokens if token.d is not None]
    return math.fsum(gaps) / len(gaps) if gaps else 0.0


def facts(row: Mapping[str, Any], tokens: Sequence[Token]) -> list[str]:
    """What there is to say of a row besides its verdict, each in a few words."""
    masked = sum(token.masked is True for token in tokens)
    said = ["no reward" if row["reward"] is None else f"reward {row['reward']:.4g}"]
    if row.get("advantage") is not None:
        said.append(f"advantage {row['advantage']:+.2f}")
    if any(token.d is not None for token in tokens):
        said.append(f"mean |d| {disagreement(tokens):.3f} nats")
    elif not masked:
        said.append("the teacher was not asked")
    if masked:
        said.append("not distilled" if masked == len(tokens) else f"{masked:,} of {len(tokens):,} tokens not distilled")
    return said


def _direction(pull: float) -> str:
    return f"{'up' if pull > 0 else 'down'} ({pull:+.2f})" if abs(pull) >= 0.005 else "none"
