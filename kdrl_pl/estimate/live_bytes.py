"""Bytes of the tensors that are alive while code runs on tensors without numbers, and the most there were at a time.

Models whose weights are fake tensors (shape, dtype and device, no storage) run their real code, forward and backward,
in moments and without memory: every product has a shape, and lives exactly as long as it would with numbers in it. So
the peak of an arbitrary model under an arbitrary objective is counted, not derived. What is not seen: space that
kernels take for themselves, and what the allocator keeps or cannot use.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside, counts storages of fake tensors from where an operation makes them until nobody holds them.

    Args:
        held: tensors that are there already and are not counted: weights, caches.

    Attributes:
        now: bytes alive.
        peak: the most there were since `restart`.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}
        for tensor in held:
            self._remember(tensor, 0)

    def restart(self) -> None:
        """Forget the peak: it is what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, FakeTensor):
                self._remember(value, value.untyped_storage().nbytes())
        return out

    def _remember(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:  # a view
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of their numbers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fake(shape: Iterable[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A fake tensor of that shape in the world of another one."""
    return like.detach().new_empty(tuple(shape), dtype=dtype)
