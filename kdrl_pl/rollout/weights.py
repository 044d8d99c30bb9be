"""Weights in another dtype while a model samples: a copy that stands in for them, or autocast's casts, kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """True when parts of the model are sharded by FSDP2."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the model computes with copies of its floating-point weights in `dtype`; afterwards with its own again.

    The parameters change places with their copies and are themselves never touched: gradients, optimizer state and the
    hooks of DistributedDataParallel hang on them. Buffers keep their dtype, as transformers keeps rotary tables.

    Args:
        model: its weights lie whole on this process.
        dtype: of the copies; None leaves everything as it is.
    """
    copies: dict[int, nn.Parameter] = {}  # one per parameter, however many modules share it
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules() if dtype is not None else ():
            for name, own in module.named_parameters(recurse=False, remove_duplicate=False):
                if own.is_floating_point() and own.dtype != dtype:
                    if id(own) not in copies:
                        copies[id(own)] = nn.Parameter(own.detach().to(dtype), requires_grad=False)
                    replaced.append((module, name, own))
                    setattr(module, name, copies[id(own)])
        yield
    finally:
        for module, name, own in replaced:
            setattr(module, name, own)


def cached_autocast(device_type: str) -> AbstractContextManager:
    """Under autocast, one in which every weight is cast once; otherwise nothing.

    Lightning's own casts them anew in every forward pass, and decoding makes one per token.
    """
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=True)
