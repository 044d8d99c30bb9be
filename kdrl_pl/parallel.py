"""Small helpers around torch.distributed; every one of them does nothing where no process group exists."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdrl_pl import signals
from kdrl_pl.errors import GivenUp

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

log = logging.getLogger(__name__)


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_strategy(name: str, has_adapter: bool = False) -> None:
    """Refuse ways of training that this library does not know to be right.

    Args:
        name: of a Lightning strategy, or of its class.
        has_adapter: the student is trained by an adapter (LoRA).

    Raises:
        ValueError: it is none of one device, DDP and our FSDP2, or FSDP2 with an adapter.
    """
    if has_adapter and "fsdp2" in name.lower():
        raise ValueError(
            "model.adapter and trainer.strategy fsdp2 have not been tried together; use ddp: an adapter has little to "
            "cut, and its base can be small (model.adapter.quantization: 4bit, model.dtype: bfloat16)"
        )
    if name in ("auto", "SingleDeviceStrategy", "fsdp2", "FSDP2Strategy") or name.lower().startswith("ddp"):
        return
    reason = "it has not been tried with rollouts in the training process"
    if "." in name:
        reason = "a class is given as class_path and init_args"
    elif "fsdp" in name.lower():
        reason = "FSDP1 gathers the weights in its root's forward only, and a rollout calls parts of the model"
    elif name == "ModelParallelStrategy":
        reason = "its checkpoints can tear, and of what it offers beyond FSDP2 tensor parallelism has not been tried"
    raise ValueError(
        f"trainer.strategy is {name}: {reason}. Use auto (one device), ddp (a whole student on each device) or fsdp2 "
        "(the student cut over the devices: configs/trainer/fsdp2.yaml)"
    )


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, as a new tensor; every process calls this, in the same order.

    Args:
        tensor: any shape, the same on every process, on the process group's kind of device (NCCL: GPU).
    """
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_reduce_max(value: int, device: torch.device | str) -> int:
    """The largest `value` of all processes; every process calls this, in the same order.

    Args:
        value: a whole number.
        device: where the process group works (NCCL: this rank's GPU).
    """
    if world_size() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def give_way(device: torch.device | str) -> None:
    """Ask whether a signal reached any process, or one gave up; every process calls this at the same place.

    Args:
        device: where the process group works (NCCL: this rank's GPU).

    Raises:
        Preempted: a signal did; every process raises it.
        GivenUp: one gave up (on rank 0; the others end as for a signal, silently).
    """
    signum = all_reduce_max(signals.received(), device)
    if signum == signals.GAVE_UP:
        why = signals.reason()
        signals.forget()
        if rank() == 0:
            raise GivenUp(why or "another rank cannot go on; it has said why")
        if why:
            log.error("rank %d cannot go on: %s", rank(), why)
        signum = signals.SIGNALS[0]
    if signum:
        raise signals.Preempted(signum, rank())


@contextmanager
def gradient_sync(module: LightningModule, enabled: bool) -> Iterator[None]:
    """Inside, backward passes synchronise gradients over ranks only if `enabled`: once per update is enough.

    Args:
        module: the LightningModule, with its `student`; under DDP its strategy holds the wrapper.
        enabled: True for the last micro-batch of an update.
    """
    if world_size() == 1:
        yield
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    wrapper = module.trainer.strategy.model
    if isinstance(module.student, FSDPModule):
        module.student.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(wrapper, DistributedDataParallel) and not enabled:
        with wrapper.no_sync():
            yield
    else:
        yield


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the full weights of an FSDP2 model stand on this process and any part of it may be called freely.

    Ranks may then take different numbers of forward passes, which would dead-lock otherwise. Entering is collective,
    leaving is not, so one rank may leave early by an exception. On leaving, every module is sharded again, and whether
    layers reshard after their forward is as `models.sharding.shard` set it (FSDP2's default: all but the root do). A
    model without FSDP2 is left alone.

    Args:
        model: the root, that is the module `fully_shard` was called on last.

    Raises:
        ValueError: FSDP2 modules lie inside `model`, but it is not one itself.
    """
    if not dist.is_available():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        yield
        return
    if sharded[0] is not model:
        raise ValueError(
            f"{type(model).__name__} holds FSDP2 modules but is not sharded itself; pass the root, "
            "the module fully_shard was called on last"
        )
    _settle_root(model)
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            reshards = module is not model and getattr(model, "reshards_layers", True)
            module.set_reshard_after_forward(reshards, recurse=False)


def _settle_root(model: nn.Module) -> None:
    """Makes `model` FSDP2's root, which otherwise is whichever module runs first: a rollout may come before the root's
    first forward and call a part of it."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    name = "_settle_fsdp_root"
    setattr(model, name, MethodType(lambda _, unused: None, model))
    register_fsdp_forward_method(model, name)
    getattr(model, name)(0)  # on a GPU FSDP2 knows no forward without an argument
    delattr(model, name)
