"""Faults on demand: rewards, engines and students that fail at a named moment, in this process or in a real command.

A command line finds them with `tests/faults` on PYTHONPATH and `--allow-import injectors`.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback

from kdrl_pl.module import KDRLModule
from kdrl_pl.rewards.base import Completion, RewardOutput
from kdrl_pl.rollout.engine import Completions
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sampling import Sampling


def this_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


class FaultyReward:
    """Correct when the sum of the sampled ids is even; at one call, on one rank, something else happens.

    Args:
        fault: "raise", "hang", "nan", "exit" (the process dies at once) or "none".
        call: at which call, validation included, counted from 0.
        rank: on which rank.
        seconds: how long it hangs.
        mark: file that is written when it happens.
    """

    def __init__(
        self, fault: str = "none", call: int = 0, rank: int = 0, seconds: float = 3600.0, mark: str | None = None
    ) -> None:
        self.fault, self.call, self.rank, self.seconds, self.mark = fault, call, rank, seconds, mark
        self.calls = 0

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        now, self.calls = self.calls, self.calls + 1
        right = [sum(completion.token_ids) % 2 == 0 for completion in completions]
        if now == self.call and this_rank() == self.rank and self.fault != "none":
            if self.mark:
                Path(self.mark).write_text(str(time.time()))
            if self.fault == "raise":
                raise ZeroDivisionError(f"injected into rank {self.rank}: \x1b[2J")
            if self.fault == "exit":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hang":
                time.sleep(self.seconds)
            if self.fault == "nan":
                return RewardOutput([math.nan] * len(right), right)
        return RewardOutput([float(value) for value in right], right)


class SignallingEngine(InProcessEngine):
    """Sends this process a signal in the middle of decoding.

    Args:
        signum: the signal.
        call: in which call of `generate`, validation included, counted from 0.
        step: before which forward pass of it.
        rank: on which rank.
        mark: file that then holds the number of forward passes that were begun after the signal, over all calls.
    """

    def __init__(self, signum: int = 15, call: int = 0, step: int = 3, rank: int = 0, mark: str | None = None) -> None:
        super().__init__()
        self.signum, self.call, self.step, self.rank, self.mark = signum, call, step, rank, mark
        self.calls, self.steps, self.later = 0, 0, None

    def generate(  # as the protocol has it, or a config may not name this class
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        keys: Sequence[int],
        should_stop: Callable[[], bool] | None = None,
    ) -> Completions:
        def watched() -> bool:
            if self.calls == self.call and self.steps == self.step and this_rank() == self.rank:
                os.kill(os.getpid(), self.signum)
                self.later = 0
            self.steps += 1
            stop = should_stop()
            if self.later is not None and not stop:
                self.later += 1
            if self.later is not None and self.mark:
                Path(self.mark).write_text(str(self.later))
            return stop

        self.steps = 0
        try:
            return super().generate(prompts, group_size, sampling, keys, watched)
        finally:
            self.calls += 1


class SlowEngine(InProcessEngine):
    """Pauses before every forward pass, from the second call of `generate` on.

    Args:
        pause: seconds.
        rank: on which rank.
        mark: file that is written when the first such pass begins.
    """

    def __init__(self, pause: float = 0.5, rank: int = 0, mark: str | None = None) -> None:
        super().__init__()
        self.pause, self.rank, self.mark, self.calls = pause, rank, mark, 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        keys: Sequence[int],
        should_stop: Callable[[], bool] | None = None,
    ) -> Completions:
        def slow() -> bool:
            if self.calls > 1 and this_rank() == self.rank:
                Path(self.mark).touch()
                time.sleep(self.pause)
            return should_stop()

        self.calls += 1
        return super().generate(prompts, group_size, sampling, keys, slow)


class SignalIn(Callback):
    """Sends this process a signal in one of its hooks.

    Args:
        hook: which.
        signum: the signal.
        rollout: when so many rollouts are done.
    """

    def __init__(self, hook: str, signum: int = 15, rollout: int = 0) -> None:
        self.signum, self.rollout, self.sent = signum, rollout, False
        setattr(self, hook, self._send)

    def _send(self, trainer, module, *_, **__) -> None:
        if module.rollouts_done == self.rollout and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.signum)


class NaNStudent(KDRLModule):
    """A student that yields NaN log-probs, infinite losses or NaN gradients in the training of some rollouts.

    `bad` maps a rollout to "logprobs", "loss" or "gradient"; on `rank` only.
    """

    bad: dict[int, str] = {}
    rank = 0

    def loss(self, experience, rollout=None):
        fault = self.bad.get(self.rollouts_done if rollout is None else rollout)
        if this_rank() != self.rank:
            fault = None
        output = super().loss(experience, rollout)
        if fault == "logprobs":  # though the loss does not show it
            output.logprobs = output.logprobs + torch.nan
        if fault == "loss":  # without a gradient of its own
            output.loss = output.loss + torch.inf
        if fault == "gradient":
            output.loss = output.loss + (self.student.model.lm_head.weight[0, 0] * 0).sqrt() * 0  # 0 times infinity
        return output


def small_disk(size: int) -> None:
    """No file of this process may grow beyond `size` bytes from now on; for `preexec_fn` and for children of a fork."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_script(file: str, *arguments: object) -> None:
    """Run a test file as a script, which starts its second process itself, and wait for its end."""
    root = Path(__file__).parents[2]
    paths = (root, root / "tests", root / "tests" / "faults")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, file, *map(str, arguments)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-4000:]
