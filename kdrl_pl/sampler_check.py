"""Do sampler and trainer speak of the same policy? Their log-probs of the same tokens are compared, always.

A difference beyond rounding means a wrong mask, position, temperature, template or stale weights: silent, and fatal
for the importance ratio.
"""

from __future__ import annotations

import math

import torch

from kdrl_pl.errors import RunError
from kdrl_pl.experience import Experience
from kdrl_pl.metrics import MetricSums

# dtype the models compute in -> largest mean and largest single difference, nats
LIMITS = {"float32": (1e-5, 1e-3), "bfloat16": (0.05, 5.0), "float16": (0.02, 2.0)}
ANOTHER_ENGINE = (1e-3, 0.1)  # at least, where other code computed the sampler's: its kernels round in another order
MEAN, MAX = "rollout/sampler_drift_mean", "rollout/sampler_drift_max"


class SamplerCheck:
    """Measures the drift of every rollout and stops the run when that of its first one is no rounding error."""

    def __init__(self) -> None:
        self.done = False

    def measure(self, logprobs: torch.Tensor, experience: Experience, sums: MetricSums) -> None:
        """Add the drift of these rows to `sums`.

        Args:
            logprobs: (B, T) float32 nats, of the trainer, before its first step on these rows.
            experience: the rows, with `behavior_logprobs`.
            sums: receives mean and maximum.
        """
        drift = (logprobs - experience.behavior_logprobs).abs()[experience.response_mask]
        sums.add(MEAN, drift.sum(), drift.numel())
        sums.add(MAX, drift.max() if drift.numel() else 0.0, drift.numel())

    def run(self, sums: MetricSums, device: torch.device, dtype: str, sampler_dtype: str | None = None) -> None:
        """Compare the first rollout's drift with the limits; every rank calls it.

        Args:
            sums: what `measure` added.
            device: where the process group works.
            dtype: what the trainer computes in.
            sampler_dtype: what the sampler computed in, if it has a dtype of its own; None is the trainer's.

        Raises:
            RunError: it lies above them.
        """
        if self.done:
            return
        sums.ensure([MEAN, MAX])
        drift = MetricSums({name: pair for name, pair in sums.sums().items() if name in (MEAN, MAX)})
        values = drift.reduce(device).compute()
        # A rollout without signal has nothing to compare, one with NaN is skipped and says nothing; the next one may.
        self.done = math.isfinite(values.get(MEAN, math.nan))
        limits = [LIMITS[dtype]] if sampler_dtype is None else [LIMITS[dtype], LIMITS[sampler_dtype], ANOTHER_ENGINE]
        mean_limit, max_limit = map(max, zip(*limits, strict=True))
        if values.get(MEAN, 0.0) > mean_limit or values.get(MAX, 0.0) > max_limit:
            raise RunError(
                f"sampler and trainer disagree on the log-probs of the first rollout: {values[MEAN]:.2g} nats on "
                f"average, {values[MAX]:.2g} at most (limits for {sampler_dtype or dtype}: {mean_limit:g} and "
                f"{max_limit:g}). They must be the same policy: compare attn_implementation, dtype and temperature on "
                "both sides"
            )
