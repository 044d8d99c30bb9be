"""What Lightning iterates over: sized plain iterables of `PromptBatch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kdrl_pl.data.prompts import Prompt, PromptBatch
from kdrl_pl.data.sampler import PromptSampler, occurrences


class Resumable:
    """Tells Lightning that a loader resumes in the middle of an epoch; where, it is told and need not keep."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class RolloutLoader(Resumable):
    """A sized iterable of one `PromptBatch` per rollout; iterating yields the rest of the current epoch.

    No torch DataLoader on purpose: Lightning neither prefetches nor re-shards a sized plain iterable, and does not
    fast-forward it on resume, so it starts where the run stands.

    Args:
        prompts: per set, in the order of the sampler.
        sampler: decides the global list of each rollout.
        position: rollouts done so far and the length of an epoch (None: that of the sampler), asked for at the first
            batch of each epoch.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        sampler: PromptSampler,
        position: Callable[[], tuple[int, int | None]] = lambda: (0, None),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.prompts = prompts
        self.sampler = sampler
        self.position = position
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.sampler.rollouts_per_epoch

    def __iter__(self) -> Iterator[PromptBatch]:
        k, length = self.position()
        length = length or len(self)
        yield self.batch(k)
        for later in range(k + 1, (k // length + 1) * length):
            yield self.batch(later)

    def batch(self, k: int) -> PromptBatch:
        """This rank's share of rollout k: every `world_size`-th prompt of the global list."""
        drawn = self.sampler.rollout(k)
        mine = slice(self.rank, None, self.world_size)
        batch = PromptBatch(k, [self.prompts[name][row] for name, row in drawn[mine]], occurrences(drawn)[mine])
        self.sampler.follow(batch, drawn)
        return batch


class EvaluationLoader:
    """A sized iterable over one set in its own order; ranks get equally many batches.

    Args:
        name: of the set.
        prompts: all of them; rank r of w takes every w-th. A rank that runs out takes copies flagged `is_padding`.
        batch_size: prompts per batch on this rank.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, name: str, prompts: Sequence[Prompt], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        padded = -(-len(prompts) // world_size) * world_size
        mine = range(rank, padded, world_size)
        self.prompts = [prompts[i % len(prompts)] for i in mine]
        self.is_padding = [i >= len(prompts) for i in mine]

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for number in range(len(self)):
            part = slice(number * self.batch_size, (number + 1) * self.batch_size)
            yield PromptBatch(number, self.prompts[part], dataset=self.name, is_padding=self.is_padding[part])
