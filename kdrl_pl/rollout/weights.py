"""A copy of a model's weights in another dtype, standing in for them while it samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
