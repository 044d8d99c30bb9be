"""A sampler with memory: prompts are drawn the more often, the nearer their measured pass rate is to a target.

A prompt that is always or never solved gives no advantage: a binary reward of pass rate p has variance p (1 - p), which
is what the weights follow. The rate of a prompt is the moving average of its share of correct responses; it is measured
only where the prompt is drawn, so it lags behind the student, and the floor brings every prompt back now and then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdrl_pl.data.prompts import PromptBatch
from kdrl_pl.data.sampler import PromptSampler
from kdrl_pl.errors import RunError
from kdrl_pl.parallel import all_reduce_sum, rank, world_size
from kdrl_pl.rollout.streams import stream_key, uniforms


class Curriculum:
    """How measured pass rates become weights: `floor + (1 - floor) (p/t)^2t ((1-p)/(1-t))^2(1-t)`.

    The second factor is 1 at the target t, 0 at p = 0 and p = 1, and 4 p (1 - p) for t = 0.5.

    Args:
        target: pass rate that is drawn most, between 0 and 1.
        floor: weight of prompts that are always or never solved, relative to those at the target.
        prior: pass rate of a prompt that was never drawn.
        smoothing: part of the newest visit in the moving average, which begins at the prior.

    Raises:
        ValueError: a number is outside its range.
    """

    def __init__(self, target: float = 0.5, floor: float = 0.05, prior: float = 0.5, smoothing: float = 0.5) -> None:
        for name, value, allowed, is_allowed in (
            ("target", target, "more than 0 and less than 1", 0 < target < 1),
            ("floor", floor, "more than 0, so that every prompt is drawn again, and at most 1", 0 < floor <= 1),
            ("prior", prior, "0 to 1", 0 <= prior <= 1),
            ("smoothing", smoothing, "more than 0, and at most 1", 0 < smoothing <= 1),
        ):
            if not is_allowed:
                raise ValueError(f"data.curriculum.{name} is {value}; expected {allowed}")
        self.target, self.floor, self.prior, self.smoothing = target, floor, prior, smoothing

    def weights(self, rates: np.ndarray) -> np.ndarray:
        """(N,) float64 weights, all positive, of prompts with pass rates (N,) float64."""
        t = self.target
        signal = (rates / t) ** (2 * t) * ((1 - rates) / (1 - t)) ** (2 * (1 - t))
        return self.floor + (1 - self.floor) * signal

    def updated(self, rate: float, share: float) -> float:
        """The pass rate after a visit in which this share of the responses was correct."""
        return rate + self.smoothing * (share - rate)


class CurriculumSampler(PromptSampler):
    """Draws the prompts of rollout k by weight, once every rollout before it has been heard.

    Several sets keep their exact shares. Inside a set, rows are drawn without replacement by the race of Efraimidis and
    Spirakis (2006): the n rows with the smallest -log(u) / weight, where the u of a rollout are a function of (seed, k,
    set) alone. More draws than rows begin again from the winner.

    The memory is global: pass rates come from all ranks, and every rank holds the same.

    Args:
        curriculum: how pass rates become weights.
        uids: per set the names of its prompts, in the order of the config.
        weights: per set its share relative to the others; None means equal.
        prompts_per_rollout: P, over all ranks.
        seed: of the draws.
        world_size: ranks that share a rollout; P must divide.

    Raises:
        ValueError: see `PromptSampler`.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        uids: Mapping[str, Sequence[str]],
        weights: Mapping[str, float] | None = None,
        prompts_per_rollout: int = 128,
        seed: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__({name: len(u) for name, u in uids.items()}, weights, prompts_per_rollout, seed, world_size)
        self.curriculum, self.uids = curriculum, uids
        self.rates = {name: np.full(len(u), curriculum.prior) for name, u in uids.items()}
        self.seen = {name: np.zeros(len(u), dtype=bool) for name, u in uids.items()}
        self._unheard: PromptBatch | None = None  # the last batch that was handed out
        self._drawn: Sequence[tuple[str, int]] = ()  # the global list that it is of

    def rollout(self, k: int) -> list[tuple[str, int]]:
        """The global list of rollout k.

        Raises:
            RunError: the rollout before it has not been sampled yet.
        """
        self.hear(k)
        names = [name for name, _ in super().rollout(k)]  # the sets' shares
        drawn = {name: iter(self._race(k, name, names.count(name))) for name in self.names}
        return [(name, next(drawn[name])) for name in names]

    def _race(self, k: int, name: str, count: int) -> list[int]:
        u = uniforms([stream_key(self.seed, k, name, 0, 0)], 0, len(self.rates[name]))[0]
        finish = -np.log1p(-u) / self.curriculum.weights(self.rates[name])
        return np.resize(np.argsort(finish, kind="stable"), count).tolist()

    def follow(self, batch: PromptBatch, drawn: Sequence[tuple[str, int]]) -> None:
        self._unheard, self._drawn = batch, drawn
        measured = np.concatenate([self.rates[name][self.seen[name]] for name in self.names])
        batch.metrics["data/prompts_seen"] = (len(measured), 1)
        batch.metrics["data/pass_rate_mean"] = (float(measured.sum()), len(measured))

    def hear(self, done: int) -> None:
        """Remember how the last batch went, if it is one of the first `done` rollouts; every rank calls it.

        Raises:
            RunError: it has not been sampled: its successor was fetched too early.
        """
        batch = self._unheard
        if batch is None or batch.rollout >= done:
            return
        if batch.experience is None:
            raise RunError(
                f"the prompts of rollout {batch.rollout + 1} were fetched before rollout {batch.rollout} was sampled; "
                "a curriculum needs its pass rates first: do not prefetch data.train_dataloader()"
            )
        self._unheard = None
        correct = batch.experience.correct.double().view(len(batch), -1).mean(1)  # (P / ranks,)
        shares = torch.zeros(self.prompts_per_rollout, dtype=torch.float64, device=correct.device)
        shares[rank() :: world_size()] = correct
        for (name, row), share in zip(self._drawn, all_reduce_sum(shares).tolist(), strict=True):
            self.rates[name][row] = self.curriculum.updated(self.rates[name][row], share)
            self.seen[name][row] = True

    def state_dict(self, done: int) -> dict[str, Any]:
        """The memory after `done` rollouts: uid -> pass rate of every prompt seen. Every rank calls it."""
        self.hear(done)
        return {
            self.uids[name][row]: float(self.rates[name][row])
            for name in self.names
            for row in np.flatnonzero(self.seen[name]).tolist()
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over pass rates; prompts that are not in the sets are left out."""
        for name in self.names:
            for row, uid in enumerate(self.uids[name]):
                if uid in state:
                    self.rates[name][row], self.seen[name][row] = state[uid], True
