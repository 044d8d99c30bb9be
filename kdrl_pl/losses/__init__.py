"""The objective: a sum of terms, each in a file of its own."""

from kdrl_pl.losses.base import LossOutput, Objective, PolicyOutput, Term
from kdrl_pl.losses.disco import DisCO
from kdrl_pl.losses.distillation import Distillation
from kdrl_pl.losses.gspo import GSPO
from kdrl_pl.losses.policy_gradient import PolicyGradient
from kdrl_pl.losses.reward_shaping import RewardShaping

__all__ = [
    "GSPO",
    "DisCO",
    "Distillation",
    "LossOutput",
    "Objective",
    "PolicyGradient",
    "PolicyOutput",
    "RewardShaping",
    "Term",
]
