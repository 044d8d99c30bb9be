"""The objective: a sum of terms, each in a file of its own."""

from kdrl_pl.losses.base import LossOutput, Objective, PolicyOutput, Term
from kdrl_pl.losses.disco import DisCO
from kdrl_pl.losses.distillation import Distillation
from kdrl_pl.losses.gspo import GSPO
from kdrl_pl.losses.ibro import IBRO
from kdrl_pl.losses.policy_gradient import PolicyGradient
from kdrl_pl.losses.reference_kl import ReferenceKL
from kdrl_pl.losses.reward_shaping import RewardShaping
from kdrl_pl.losses.tgpo import TGPO

__all__ = [
    "GSPO",
    "IBRO",
    "TGPO",
    "DisCO",
    "Distillation",
    "LossOutput",
    "Objective",
    "PolicyGradient",
    "PolicyOutput",
    "ReferenceKL",
    "RewardShaping",
    "Term",
]
