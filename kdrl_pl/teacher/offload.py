"""Weights that wait in the host's memory and are copied to the device while they are used."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BLOCK = 2**30  # bytes; torch rounds each piece of pinned memory up to a power of two, so tensors share large ones
ALIGNMENT = 64  # bytes


class WaitingWeights:
    """The parameters of a frozen model. They never change, so nothing is ever copied back: what stands on the device
    is let go.

    Buffers and the scales of quantised weights (a sixty-fourth of them) stay on the device. On the CPU, where the
    weights are at home, every move is none.

    Args:
        model: its parameters may stand on the device or on the CPU; afterwards they wait.
        device: where they are used.
    """

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._parameters = list(model.parameters())
        # bitsandbytes keeps a second name for 8-bit weights, which must follow them.
        self._eight_bit = [m for m in model.modules() if getattr(getattr(m, "state", None), "CB", None) is not None]
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        tensors = [parameter.data for parameter in self._parameters]
        self._home = pinned(tensors) if self.device.type == "cuda" else tensors
        self._here: set[int] = set(map(id, self._parameters))  # parameters that may stand on the device
        self.send_away()

    def bring(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Copy the named parameters to the device (all by default), if they are not there."""
        wanted = None if parameters is None else {id(parameter) for parameter in parameters}
        for parameter, home in zip(self._parameters, self._home, strict=True):
            if id(parameter) not in self._here and (wanted is None or id(parameter) in wanted):
                parameter.data = home.to(self.device, non_blocking=True)
                self._here.add(id(parameter))
        self._follow()

    def send_away(self, keep: Iterable[nn.Parameter] = ()) -> None:
        """Let go of what stands on the device, but for `keep`."""
        kept = {id(parameter) for parameter in keep}
        for parameter, home in zip(self._parameters, self._home, strict=True):
            if id(parameter) in self._here - kept:
                parameter.data = home
        self._here &= kept
        self._follow()

    def _follow(self) -> None:
        for module in self._eight_bit:
            module.state.CB = module.weight.data


def pinned(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies in pinned memory, from which a GPU reads at full speed (in plain memory where there is none)."""
    copies: list[Tensor] = []
    waiting: list[Tensor] = []

    def lay_down() -> None:
        sizes = [-(-_bytes(tensor) // ALIGNMENT) * ALIGNMENT for tensor in waiting]
        block, start = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available()), 0
        for tensor, size in zip(waiting, sizes, strict=True):
            place = block[start : start + _bytes(tensor)].view(tensor.dtype).view(tensor.shape)
            copies.append(place.copy_(tensor))
            start += size
        waiting.clear()

    for tensor in tensors:
        if waiting and sum(map(_bytes, waiting)) + len(waiting) * ALIGNMENT + _bytes(tensor) > BLOCK:
            lay_down()
        waiting.append(tensor)
    if waiting:
        lay_down()
    return copies


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
