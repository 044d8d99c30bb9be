"""Optimizer and learning rate, the same for every module that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdrl_pl.schedules import Schedule


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """AdamW, learning rate 1e-6, no decay."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True)


def make_optimizer(make: Callable[[Any], torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the trainable weights; a group remembers its settings and the rate that the schedule multiplies.

    Raises:
        ValueError: the optimizer refuses its settings.
    """
    try:
        optimizer: Any = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.optimizer does not take its settings: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["settings"] = {name: value for name, value in group.items() if name != "params"}
    optimizer.settings = [group["settings"] for group in optimizer.param_groups]
    return optimizer


def keep_settings(optimizer: Any) -> None:
    """Once a checkpoint is loaded: where this run has another setting than the one that saved it, this run's holds.

    torch takes a group's settings from the checkpoint too, so that resuming with a lower learning rate would change
    nothing. What an optimizer itself keeps among them is set alike in both runs, and stays.

    Args:
        optimizer: from `make_optimizer`.
    """
    for group, settings in zip(optimizer.param_groups, optimizer.settings, strict=True):
        saved = group.get("settings", {})
        group.update({name: value for name, value in settings.items() if name not in saved or saved[name] != value})
        group["settings"] = settings


def set_learning_rate(optimizer: Any, schedule: Schedule, iteration: int) -> None:
    """Set every group's rate to its initial one times the schedule's value."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * schedule.value(iteration)


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """Scale gradients to at most `limit`; returns the norm of the whole gradient before, the same on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf if limit is None else limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
