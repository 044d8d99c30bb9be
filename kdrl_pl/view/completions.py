"""A few of a rollout's completions to look at: the best, the worst, and one by lot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

from kdrl_pl.text import printable

if TYPE_CHECKING:
    from kdrl_pl.data.prompts import PromptBatch


@dataclass(frozen=True)
class Shown:
    """One completion, its texts as the model wrote them.

    Args:
        why: "best", "worst" or "random".
        prompt: what the model read.
        answer: what it wrote.
        reward: shaped reward.
        advantage: of the row; None where the objective has none.
        verdict: "right", "wrong" or "cut off".
        parts: the rewards that the reward is made of.
    """

    why: str
    prompt: str
    answer: str
    reward: float
    advantage: float | None
    verdict: str
    parts: Mapping[str, float | None] = field(default_factory=dict)


def choose(rollout: int, advantages: Sequence[float], rewards: Sequence[float]) -> dict[str, int]:
    """Which rows to show: the largest and the smallest advantage (then reward), and one drawn by the rollout's number.

    >>> choose(3, [0.5, -1.0, 0.5, 0.0], [1.0, 0.0, 2.0, 1.0])
    {'best': 2, 'worst': 1, 'random': 0}
    """
    rows = range(len(rewards))
    drawn = int.from_bytes(blake2b(str(rollout).encode(), digest_size=8).digest(), "big") % len(rewards)
    return {
        "best": max(rows, key=lambda row: (advantages[row], rewards[row])),
        "worst": min(rows, key=lambda row: (advantages[row], rewards[row])),
        "random": drawn,
    }


def shown(batch: PromptBatch) -> list[Shown]:
    """The completions of a trained batch that are worth a look; of this rank's rows."""
    rows = batch.experience
    rewards = rows.rewards.tolist()
    advantages = None if rows.advantages is None else rows.advantages.tolist()
    samples = len(rows) // len(batch)
    verdicts = [
        "right" if right else "cut off" if cut else "wrong"
        for right, cut in zip(rows.correct.tolist(), rows.truncated.tolist(), strict=True)
    ]
    return [
        Shown(
            why,
            batch.prompts[row // samples].text,
            batch.completions[row],
            rewards[row],
            None if advantages is None else advantages[row],
            verdicts[row],
            {name: values[row] for name, values in batch.reward_parts.items()},
        )
        for why, row in choose(batch.rollout, advantages or rewards, rewards).items()
    ]


def one_line(text: str, limit: int) -> str:
    r"""`text` that is safe to print, its line ends as signs, shortened in the middle to about `limit` characters.

    >>> one_line("one\ntwo", 40)
    'one ⏎ two'
    >>> one_line("abcdefghij" * 10, 20)
    'abcdefghij … 80 more … abcdefghij'
    """
    text = " ⏎ ".join(printable(text.strip()).replace("\t", " ").split("\n"))
    if len(text) <= limit + 16:  # the words in the middle take room too
        return text
    half = limit // 2
    return f"{text[:half]} … {len(text) - 2 * half} more … {text[-half:]}"
