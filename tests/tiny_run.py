"""A whole training run on tiny random models, put together as the command line does it; tests import this module."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from kdrl_pl import fsdp2  # noqa: F401 - the strategy of that name
from kdrl_pl.checkpoint import AtomicCheckpointIO, Checkpoints
from kdrl_pl.cli.lightning import TRAINER_DEFAULTS
from kdrl_pl.data.datamodule import PromptDataModule
from kdrl_pl.data.loading import SetConfig
from kdrl_pl.losses import Distillation
from kdrl_pl.models.tiny import write_tiny
from kdrl_pl.module import KDRLModule
from kdrl_pl.rewards.base import RewardOutput
from kdrl_pl.rollout.callback import RolloutCallback
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.run_folder import RunFolder
from kdrl_pl.teacher import FrozenTeacher


def write_models(folder: Path) -> tuple[str, str]:
    """A student (64 x 1 layer) and a teacher (64 x 2 layers), random, far enough apart for a KL of about 0.3 nats."""
    from safetensors.torch import load_file, save_file

    for name, layers, seed in (("student", 1, 1), ("teacher", 2, 2)):
        write_tiny(folder / name, 64, layers)
        weights = load_file(folder / name / "model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        head = weights["lm_head.weight"]
        weights["lm_head.weight"] = torch.randn(head.shape, generator=generator) * 0.08
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    return str(folder / "student"), str(folder / "teacher")


class EvenSum:
    """Correct when the sum of the sampled ids is even: about half of what a random model says.

    Args:
        only: uids of the prompts whose responses are judged so; those of the others are all wrong.
    """

    def __init__(self, only=None):
        self.only = only

    def __call__(self, completions):
        right = [
            sum(completion.token_ids) % 2 == 0 and (self.only is None or completion.prompt.uid in self.only)
            for completion in completions
        ]
        return RewardOutput([float(r) for r in right], right)


def adamw(params):
    return torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)


def make_module(student: str, teacher: str | None, cls=KDRLModule, **settings) -> KDRLModule:
    """The joint objective by default; `teacher=None` is GRPO."""
    if teacher is None:
        settings = {"distillation": None, **settings}
    settings = {"normaliser": "token", "distillation": Distillation(coef=0.3), "optimizer": adamw, **settings}
    return cls(student, FrozenTeacher(teacher) if teacher else None, **settings)


def make_data(prompts_per_rollout: int = 4, rows: int = 12, val: int = 3, **settings) -> PromptDataModule:
    """Additions of two and of three digits, so that prompts are ragged; an epoch is `rows / prompts_per_rollout`."""

    def task(digits, size):
        return SetConfig(source="addition", size=size, options={"digits": digits})

    return PromptDataModule(
        train={"two": task(2, rows // 2), "three": task(3, rows - rows // 2)},
        val={"val": task(2, val)} if val else None,
        prompts_per_rollout=prompts_per_rollout,
        val_batch_size=2,
        max_prompt_tokens=16,
        **settings,
    )


def make_rollouts(group_size: int = 4, max_tokens: int = 12, **settings) -> RolloutCallback:
    settings = {"reward": EvenSum(), "validation_samples": 2, **settings}
    return RolloutCallback(group_size=group_size, sampling=Sampling(max_tokens=max_tokens), **settings)


def make_trainer(
    folder: Path,
    *,
    max_rollouts: int | None = 6,
    rollouts: RolloutCallback | None = None,
    before: list[Callback] | None = None,
    after: list[Callback] | None = None,
    checkpoints: Checkpoints | None = None,
    **settings,
) -> Trainer:
    """Callbacks in the order of the command line; `before` and `after` stand around those that come with it."""
    callbacks = [
        *(before or []),
        RunFolder(max_rollouts=max_rollouts, keep_rollouts=-1),
        checkpoints or Checkpoints(every_n_rollouts=100),
        rollouts or make_rollouts(),
        *(after or []),
    ]
    settings = {"accelerator": "cpu", "devices": 1, "val_check_interval": 2, "logger": False, **settings}
    return Trainer(
        **{**TRAINER_DEFAULTS, **settings},
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
    )


def fit(folder: Path, module: KDRLModule, data: PromptDataModule | None = None, *, resume=None, **settings) -> Trainer:
    """Trainer.fit as `kdrl fit` calls it."""
    trainer = make_trainer(folder, **settings)
    trainer.fit(module, datamodule=data or make_data(), ckpt_path=resume, weights_only=True)
    return trainer


def metrics_rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and "_per_s" not in k} for row in rows]


def rollout_files(folder: Path) -> dict[str, str]:
    """The rows of every rollout: prompts, sampled ids, rewards, advantages, log-probs."""
    return {path.name: path.read_text() for path in sorted((folder / "rollouts").glob("*.jsonl"))}


def weights_of(module: KDRLModule) -> dict[str, torch.Tensor]:
    """Every rank calls it: sharded ones are gathered."""
    return {name: whole(value).detach().clone() for name, value in module.state_dict().items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
