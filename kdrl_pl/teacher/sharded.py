"""A teacher cut over all processes (FSDP2): its weights, its whole head, and passes by who has no rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kdrl_pl.models.sharding import shard
from kdrl_pl.models.shared_prompts import SharedPrompts
from kdrl_pl.parallel import world_size

if TYPE_CHECKING:
    from kdrl_pl.logprobs import Head
    from kdrl_pl.models.language_model import LanguageModel


def cut(model: LanguageModel, device: torch.device) -> LanguageModel:
    """Keep this process's part of every weight, on `device`; in place, and returned. Every process calls it.

    It is a root of its own, outside the student's. From then on every process must call `token_logprobs` as often as
    the others.

    Args:
        model: whole, on the CPU.
        device: of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh

    shard(model, init_device_mesh(device.type, (world_size(),)))
    root: Any = model
    root.set_reshard_after_forward(True, recurse=False)  # as the layers: no backward pass follows
    return model


def whole_head(model: LanguageModel) -> Head:
    """A copy of the output head, gathered on every process; every process calls it."""
    head: Any = model.head()
    bias = None if head.bias is None else head.bias.full_tensor()
    return replace(head, weight=head.weight.full_tensor(), bias=bias)


def idle_pass(model: LanguageModel, device: torch.device, shares: bool) -> None:
    """A pass about nothing, by a process that keeps in step with the others.

    Args:
        model: the one that is cut.
        device: of this process.
        shares: the others read prompts once, in two passes of the body.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    shared = SharedPrompts(ids[:, 0], torch.ones_like(ids[:, 0])) if shares else None
    model.token_logprobs(ids, torch.zeros_like(ids, dtype=torch.bool), shared=shared)
