"""What the soak's configs name: a reward that fails now and then, one that repeats what was recorded, a term with NaN.

What fails depends on what was sampled or on the number of the rollout, never on the clock: a rollout that is done again
after a restart fails again.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

import torch

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import PolicyOutput, Term
from kdrl_pl.rewards.base import Completion, RewardOutput


class EvenSum:
    """Correct when the sum of the sampled ids is even.

    Args:
        faulty: of 40 calls one raises, one hangs and one returns NaN, chosen by the first response.
        seconds: how long it hangs.
    """

    def __init__(self, faulty: bool = False, seconds: float = 6.0) -> None:
        self.faulty, self.seconds = faulty, seconds

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        right = [sum(completion.token_ids) % 2 == 0 for completion in completions]
        fault = sum((i + 1) * word for i, word in enumerate(completions[0].token_ids)) % 40 if self.faulty else None
        if fault == 0:
            raise ZeroDivisionError("injected")
        if fault == 1:
            time.sleep(self.seconds)
        return RewardOutput([math.nan if fault == 2 else float(r) for r in right], list(right))


class Recorded:
    """The rewards that stand in the rollout files of another run, in their order; other prompts by `EvenSum`.

    Args:
        rollouts: its folder `rollouts/`.
    """

    def __init__(self, rollouts: str) -> None:
        self.known: dict[tuple, deque] = defaultdict(deque)
        for file in sorted(Path(rollouts).glob("*.jsonl")):
            for line in file.read_text().splitlines():
                row = json.loads(line)
                self.known[row["uid"], tuple(row["response_ids"])].append((row["reward"], row["correct"]))

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        rows = []
        for completion in completions:
            kept = self.known.get((completion.prompt.uid, tuple(completion.token_ids)))
            right = sum(completion.token_ids) % 2 == 0
            rows.append(kept.popleft() if kept else (float(right), right))
        return RewardOutput([value for value, _ in rows], [right for _, right in rows])


class NaNNowAndThen(Term):
    """Nothing, but NaN in every 37th rollout.

    Args:
        coef: of the term.
    """

    def __init__(self, coef: float = 1.0) -> None:
        super().__init__(coef)

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> torch.Tensor:
        return policy.logprobs * (math.nan if rollout % 37 == 36 else 0.0)

    def weights(self, experience: Experience) -> torch.Tensor:
        return experience.token_weights[:, None] * experience.response_mask
