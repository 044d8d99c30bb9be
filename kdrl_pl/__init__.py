"""kdrl_pl: post-train reasoning language models by KDRL (arXiv 2506.02208), on Lightning.

The public names load when they are first used, so importing the package costs nothing. docs/api.md shows them at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdrl_pl.data.datamodule import PromptDataModule
    from kdrl_pl.data.prompts import Prompt, PromptBatch
    from kdrl_pl.experience import Experience
    from kdrl_pl.losses import Distillation, LossOutput, Objective, PolicyGradient, Term
    from kdrl_pl.module import KDRLModule
    from kdrl_pl.rewards import Completion, FunctionReward, Reward, RewardOutput
    from kdrl_pl.rollout.callback import RolloutCallback
    from kdrl_pl.rollout.engine import RolloutEngine
    from kdrl_pl.rollout.in_process import InProcessEngine
    from kdrl_pl.rollout.sample import sample_experience
    from kdrl_pl.rollout.sampling import Sampling
    from kdrl_pl.schedules import Schedule
    from kdrl_pl.sft import SFTModule
    from kdrl_pl.teacher import BaseTeacher, FrozenTeacher, RemoteTeacher, RoutedTeacher, VLLMTeacher

_HOME = {
    "BaseTeacher": "kdrl_pl.teacher",
    "Completion": "kdrl_pl.rewards",
    "Distillation": "kdrl_pl.losses",
    "Experience": "kdrl_pl.experience",
    "FrozenTeacher": "kdrl_pl.teacher",
    "FunctionReward": "kdrl_pl.rewards",
    "InProcessEngine": "kdrl_pl.rollout.in_process",
    "KDRLModule": "kdrl_pl.module",
    "LossOutput": "kdrl_pl.losses",
    "Objective": "kdrl_pl.losses",
    "PolicyGradient": "kdrl_pl.losses",
    "Prompt": "kdrl_pl.data.prompts",
    "PromptBatch": "kdrl_pl.data.prompts",
    "PromptDataModule": "kdrl_pl.data.datamodule",
    "RemoteTeacher": "kdrl_pl.teacher",
    "Reward": "kdrl_pl.rewards",
    "RewardOutput": "kdrl_pl.rewards",
    "RolloutCallback": "kdrl_pl.rollout.callback",
    "RolloutEngine": "kdrl_pl.rollout.engine",
    "RoutedTeacher": "kdrl_pl.teacher",
    "SFTModule": "kdrl_pl.sft",
    "Sampling": "kdrl_pl.rollout.sampling",
    "Schedule": "kdrl_pl.schedules",
    "Term": "kdrl_pl.losses",
    "VLLMTeacher": "kdrl_pl.teacher",
    "sample_experience": "kdrl_pl.rollout.sample",
}

__all__ = [
    "BaseTeacher",
    "Completion",
    "Distillation",
    "Experience",
    "FrozenTeacher",
    "FunctionReward",
    "InProcessEngine",
    "KDRLModule",
    "LossOutput",
    "Objective",
    "PolicyGradient",
    "Prompt",
    "PromptBatch",
    "PromptDataModule",
    "RemoteTeacher",
    "Reward",
    "RewardOutput",
    "RolloutCallback",
    "RolloutEngine",
    "RoutedTeacher",
    "SFTModule",
    "Sampling",
    "Schedule",
    "Term",
    "VLLMTeacher",
    "sample_experience",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kdrl_pl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
