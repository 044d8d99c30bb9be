"""FSDP2 as a Trainer strategy: student, gradients and optimizer state cut over all ranks.

It shards in `setup`, after the module has loaded the student and its checkpoint, so that hooks run in the order of
every other strategy. (Lightning's ModelParallelStrategy restores checkpoints after `on_fit_start`, where the run folder
is cut back to the rollout that is resumed.) A rank thus holds the whole student in host memory for a moment.

Checkpoints are of two kinds, by the name of the file. A single file is that of one process: rank 0 gathers it, one
tensor at a time, and it can be resumed under any strategy. A name that ends in `.sharded.ckpt` becomes a folder to
which every rank writes its part (`kdrl_pl.shards`); any strategy reads that too.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor

from kdrl_pl.models.sharding import shard
from kdrl_pl.shards import gathered, is_dtensor, is_sharded, like, read_checkpoint, save_sharded


class FSDP2Strategy(ModelParallelStrategy):
    """Cuts student, gradients and optimizer state over all ranks (FSDP2); teacher and reference stay whole on each.

    With the Trainer's precision bf16-mixed weights are gathered in bfloat16; shards, gradients and optimizer stay fp32.

    Args:
        cpu_offload: keep the shards of weights, gradients and optimizer state in host memory, the optimizer's step too.
        reshard_after_forward: give a layer's gathered weights back after its forward pass and gather them again for its
            backward pass: less memory, more traffic. False keeps them in between.
        timeout: seconds a rank waits for the others, the difference between two ranks' rollouts for example, before
            the run ends with an error.
    """

    def __init__(self, cpu_offload: bool = False, reshard_after_forward: bool = True, timeout: int = 1800) -> None:
        super().__init__(timeout=timedelta(seconds=timeout))
        self.cpu_offload, self.reshard_after_forward = cpu_offload, reshard_after_forward

    # ---- processes and model -----------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        if self.cpu_offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # gradients in host memory have a norm over all ranks
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Shard the student, once; then what every strategy does."""
        from torch.distributed.fsdp import FSDPModule

        student: Any = self.lightning_module.student
        if not isinstance(student, FSDPModule):
            shard(
                student,
                self.device_mesh["data_parallel"],
                dtype=torch.bfloat16 if trainer.precision == "bf16-mixed" else None,
                cpu_offload=self.cpu_offload,
                reshard_after_forward=self.reshard_after_forward,
            )
        super().setup(trainer)

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer).__module__.startswith("bitsandbytes"):
                raise ValueError(
                    f"model.optimizer {type(optimizer).__name__} of bitsandbytes knows no sharded weights; use "
                    "torch.optim.AdamW, whose state is sharded too"
                )

    def model_to_device(self) -> None:
        """All to this rank's device; under CPU offload all but the student, whose buffers are there already."""
        module: Any = self.lightning_module
        student = module.student
        if self.cpu_offload:
            module.student = None
        super().model_to_device()
        module.student = student

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Sharded; `save_checkpoint` gathers it or does not."""
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Sharded, with the numbering of one process.

        Raises:
            ValueError: the optimizer keeps state that is not cut as its weights are.
        """
        state = optimizer.state_dict()
        for weight, values in optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.ndim and not (is_dtensor(value) and value.shape == weight.shape):
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {name!r} in another shape than its weight's, which cannot "
                        "be sharded; use torch.optim.AdamW, or another strategy"
                    )
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One file, or a folder where the name says so; every rank calls it.

        Raises:
            RunError: it could not be written.
        """
        path = Path(self.broadcast(filepath))
        if is_sharded(path):
            return save_sharded(checkpoint, path)
        content = gathered(checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(content, path, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors stay on the disk until this rank takes its part of them.

        Raises:
            ValueError: it is damaged, or holds more than plain values.
        """
        return read_checkpoint(self.broadcast(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        saved = {name: like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(saved, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            own = dict(zip(numbers, weights, strict=False))  # another number of weights: the optimizer says so
            state = {
                number: {name: like(value, own.get(number)) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


StrategyRegistry.register("fsdp2", FSDP2Strategy, description=FSDP2Strategy.__doc__.strip().splitlines()[0])
