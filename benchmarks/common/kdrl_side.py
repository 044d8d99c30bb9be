"""Our side: real steps of `Trainer.fit`, timed by the times that every run logs."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from common.processes import PeakMemory
from common.workloads import Workload, prompt_texts, write_models
from kdrl_pl.cli.lightning import TRAINER_DEFAULTS
from kdrl_pl.data.datamodule import PromptDataModule
from kdrl_pl.data.loading import SetConfig
from kdrl_pl.experience import Experience
from kdrl_pl.losses import Distillation
from kdrl_pl.module import KDRLModule
from kdrl_pl.rewards.base import Completion, RewardOutput
from kdrl_pl.rollout import streams
from kdrl_pl.rollout.callback import RolloutCallback
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.teacher import FrozenTeacher

COEF = 0.01  # of the KL to the teacher, on both sides
EPS = 1e-4  # added to the standard deviation of rewards, on both sides (TRL's; ours is 1e-6 by default)
PHASES = ("rollout", "teacher", "score", "update")


class Alternating:
    """Every second response is right: all rows carry a signal, and all groups the same one."""

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        return RewardOutput([float(row % 2) for row in range(len(completions))])


def make_module(folder: Path, grpo: bool = False, **settings: Any) -> KDRLModule:
    """KDRL as TRL computes it too, or GRPO alone.

    TRL's KL to the reference model is k3 times the importance ratio (`use_bias_correction_kl`, its default), whose
    gradient on policy is that of k2: (e^d - d - 1) + (1 - e^d) = -d.
    """
    return KDRLModule(
        str(folder / "student"),
        None if grpo else FrozenTeacher(str(folder / "teacher")),
        distillation=None if grpo else Distillation(COEF),
        normaliser="token",
        advantage_eps=EPS,
        **settings,
    )


class Lengths:
    """Forces response lengths through the rows' random numbers: the models' probabilities stay what they are.

    The end token has the largest id, so it lies at the very end of the inverse CDF: a number just below 1 draws it,
    and numbers below 0.99 do not, as long as it is less likely than 1 in 100.
    """

    def __init__(self) -> None:
        self.of_key: dict[int, int] = {}
        self.original = streams.uniforms

    def uniforms(self, keys: Sequence[int], start: int | Sequence[int], count: int) -> np.ndarray:
        """As `kdrl_pl.rollout.streams.uniforms`; the number of a row's last token is the largest below 1."""
        numbers = self.original(keys, start, count) * 0.99
        for row, (key, first) in enumerate(zip(keys, np.broadcast_to(start, len(keys)), strict=True)):
            if first < self.of_key.get(key, 0) <= first + count:
                numbers[row, self.of_key[key] - 1 - first] = np.nextafter(1.0, 0.0)
        return numbers

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Inside, every module that uses the random numbers uses these."""
        users = [m for name, m in sys.modules.items() if name.startswith("kdrl_pl.") and hasattr(m, "uniforms")]
        for module in users:
            vars(module)["uniforms"] = self.uniforms
        try:
            yield
        finally:
            for module in users:
                vars(module)["uniforms"] = self.original


class Ending(Callback):
    """First of the callbacks: says how long the responses of this rollout are to be.

    Args:
        workload: its table.
        lengths: told of it.
        group: rows per prompt.
    """

    def __init__(self, workload: Workload, lengths: Lengths, rollouts: RolloutCallback) -> None:
        self.workload, self.lengths, self.rollouts = workload, lengths, rollouts

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        uids = [prompt.uid for prompt in batch.prompts]
        keys = streams.group_keys(self.rollouts.seed, batch.rollout, uids, batch.occurrences, self.rollouts.group_size)
        wanted = self.workload.lengths(batch.rollout)
        # A response that is to use its whole budget needs no end token, and gets none.
        full = self.workload.response_tokens
        self.lengths.of_key = {key: n for key, n in zip(keys, wanted, strict=True) if n < full}


class Clock(Callback):
    """Times of each step, and what the memory rose to.

    Args:
        workload: what is run, to check that it was.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.steps: list[dict[str, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.memory = PeakMemory()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        took = {"step": time.perf_counter() - self.started}
        lengths = batch.experience.response_lengths.tolist()
        if lengths != self.workload.lengths(batch.rollout):
            raise RuntimeError(f"responses of {lengths} tokens; the workload is {self.workload.lengths(batch.rollout)}")
        took |= {phase: pl_module.logged.get(f"time/{phase}", 0.0) for phase in PHASES}
        if batch.rollout:  # the first is the warm-up
            self.steps.append(took)


def run(
    workload: Workload,
    *,
    grpo: bool = False,
    engine: Any = None,
    ranks: int = 1,
    strategy: Any = "auto",
    watch: Sequence[Callback] = (),
    **settings: Any,
) -> dict[str, Any]:
    """A warm-up step and `workload.steps` measured ones.

    Args:
        workload: what to do, on all ranks together; on several of them of equal lengths.
        grpo: without the teacher.
        engine: a rollout engine other than the default.
        ranks: processes; Lightning starts the others by running this program again.
        strategy: of the Trainer.
        watch: further callbacks, called before the rollout.
        settings: further arguments of `KDRLModule`.

    Returns:
        `steps`: seconds of each step and its phases; `peak_mb`: how far memory rose above what it was at the start of
        training.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(workload, folder)
        texts = prompt_texts(workload, workload.steps + 1)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        data = PromptDataModule(
            train={"prompts": SetConfig(str(folder / "prompts.jsonl"), answer_column=None)},
            prompts_per_rollout=workload.prompts,
        )
        own = replace(workload, prompts=workload.prompts // ranks)
        lengths, clock = Lengths(), Clock(own)
        sampling = Sampling(max_tokens=workload.response_tokens)
        rollouts = RolloutCallback(Alternating(), workload.group, sampling, engine=engine)
        trainer = Trainer(
            **{**TRAINER_DEFAULTS, "val_check_interval": None, "num_sanity_val_steps": 0},
            accelerator="cpu",
            devices=ranks,
            strategy=strategy,
            precision=workload.precision,
            logger=False,
            max_steps=workload.steps + 1,
            callbacks=[clock, *watch, Ending(own, lengths, rollouts), rollouts],
            default_root_dir=folder,
        )
        module = make_module(folder, grpo, **settings)
        with lengths.forced():
            trainer.fit(module, datamodule=data)
    return {"steps": clock.steps, "peak_mb": clock.memory.mb()}


def agreement(workload: Workload, folder: Path, prompts: list[list[int]], responses: list[list[int]]) -> dict[str, Any]:
    """Policy loss, KL to the teacher and gradient of given rows.

    Args:
        workload: says how many rows a group has.
        folder: with `student` and `teacher`.
        prompts, responses: token ids of each row.
    """
    module, group = make_module(folder).load(), workload.group
    rows = Experience.from_rows(
        prompts, responses, [float(row % 2) for row in range(len(prompts))], [r // group for r in range(len(prompts))]
    )
    module.score(rows)
    output = module.loss(rows)
    output.loss.backward()
    kl, tokens = output.metrics["teacher/reverse_kl_k3"]
    return {
        "policy_loss": float(output.parts["pg"]),
        "kl": float(kl) / float(tokens),
        "gradient": {name: parameter.grad.clone() for name, parameter in module.student.model.named_parameters()},
    }


def load_rows(module: KDRLModule, workload: Workload) -> Experience:
    """Rows of the workload's sizes with random responses, as a rollout would leave them."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, workload.vocabulary - 1, (count,), generator=generator).tolist()

    prompts = [ids(workload.prompt_tokens) for _ in range(workload.prompts)]
    groups = [row // workload.group for row in range(workload.rows)]
    rewards = [float(row % 2) for row in range(workload.rows)]
    return Experience.from_rows([prompts[g] for g in groups], [ids(n) for n in workload.lengths(1)], rewards, groups)
