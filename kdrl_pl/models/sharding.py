"""The student cut over the ranks of a run (FSDP2, torch's `fully_shard`): layer by layer, then the root.

In bfloat16 the weights are gathered in bfloat16, while the shards, the sum of the gradients over ranks and the
optimizer stay in float32. A gathered student then takes 2 bytes a weight instead of 4, and a rollout, for which all of
it is gathered, need not cast it again. What enters is not cast: the teacher's hidden states pass through here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from kdrl_pl.models.language_model import LanguageModel


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the outermost list of modules (one of experts lies inside a layer)."""
    return next((list(module) for module in model.modules() if isinstance(module, nn.ModuleList)), [])


def shard(
    model: LanguageModel,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
) -> None:
    """Cut every weight along its first dimension over the ranks of `mesh`, in place.

    Args:
        model: whole, the same on every rank.
        mesh: one-dimensional.
        dtype: that weights are gathered in; None leaves them in their own.
        cpu_offload: shards, gradients and optimizer state lie in host memory.
        reshard_after_forward: drop a layer's gathered weights after its forward pass and gather them again for its
            backward pass.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    own = next(model.parameters()).dtype
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": None if reshard_after_forward else False,  # None: all but the root
        "mp_policy": MixedPrecisionPolicy(dtype, own if dtype else None, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for layer in layers_of(model):
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    register_fsdp_forward_method(model, "token_logprobs")
    root: Any = model
    root.reshards_layers = reshard_after_forward  # for `parallel.gathered_weights`
