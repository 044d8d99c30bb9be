"""A key/value cache for rollouts: it grows in place, and its lines can be dropped, moved and taken over by other rows.

Notation: B lines (rows of the batch), T columns (tokens). All lines end in the same column, and what a line does not
fill lies on its left, hidden by the attention mask.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are views of larger buffers, so that one token costs one column.

    transformers' own copies itself whole at every token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None  # (B, heads, T and more, size)
        self._start = 0  # their column where the keys begin
        self._view: Tensor | None = None  # the keys as we left them; the base class's methods put others in their place

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, heads, new, size) keys and values; returns all of them, (B, heads, T, size) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        held, new = self.keys.shape[-2], key_states.shape[-2]
        if self.keys is not self._view or self._start + held + new > self._buffers[0].shape[-2]:
            self._buffers = _with_room(self.keys, new), _with_room(self.values, new)
            self._start = 0
        keys, values = self._buffers
        keys.narrow(2, self._start + held, new).copy_(key_states)
        values.narrow(2, self._start + held, new).copy_(value_states)
        self._look_at(self._start, held + new)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """These lines, in this order, with room to grow; one may be named several times. They are copied once."""
        if self.is_initialized:
            length = self.keys.shape[-2]
            self._buffers = _with_room(self.keys, 0, indices), _with_room(self.values, 0, indices)
            self._look_at(0, length)

    def move_lines(self, targets: Tensor, sources: Tensor, count: int) -> None:
        """Lines `sources` take the places `targets`, then `count` lines are left; the others are not copied."""
        if self.is_initialized:
            if len(targets):
                for states in (self.keys, self.values):
                    states[targets] = states[sources]
            keys, values = self._buffers
            self._buffers = keys[:count], values[:count]
            self._look_at(self._start, self.keys.shape[-2])

    def take_over(self, lines: Tensor, other: GrowingLayer, rows: Tensor) -> None:
        """Lines `lines` become lines `rows` of `other`, at the right edge; of a wider one the last columns."""
        if not self.is_initialized:
            return
        columns = min(self.keys.shape[-2], other.keys.shape[-2])
        for states, new in ((self.keys, other.keys), (self.values, other.values)):
            states[lines, :, states.shape[-2] - columns :] = new[rows, :, new.shape[-2] - columns :]

    def drop_columns(self, count: int) -> None:
        """Forget the first `count` columns; nothing is copied."""
        if self.is_initialized:
            self._look_at(self._start + count, self.keys.shape[-2] - count)

    def _look_at(self, start: int, length: int) -> None:
        """Keys and values are these columns of the buffers."""
        self._start = start
        self.keys, self.values = (buffer.narrow(2, start, length) for buffer in self._buffers)
        self._view = self.keys


class GrowingWindowLayer(GrowingLayer):
    """The same for a layer with a sliding window, which holds the last `sliding_window - 1` columns."""

    is_sliding = True

    def __init__(self, sliding_window: int) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.columns = 0  # T, those outside the window included

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns them behind those that the window still held."""
        keys, values = super().update(key_states, value_states)
        self.columns += key_states.shape[-2]
        self._cut()
        return keys, values

    def drop_columns(self, count: int) -> None:
        """Forget the first `count` columns of all; nothing is copied."""
        self.columns -= count
        if self.is_initialized:
            self._cut()

    def get_seq_length(self) -> int:
        """T."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first column of the keys that `update` will return."""
        held = min(self.columns, self.sliding_window - 1)
        return held + query_length, self.columns - held

    def _cut(self) -> None:
        outside = self.keys.shape[-2] - min(self.columns, self.sliding_window - 1)
        if outside and self._buffers is not None:
            super().drop_columns(outside)
        elif outside:  # read, and not yet handed to rows
            self.keys, self.values = self.keys[:, :, outside:], self.values[:, :, outside:]


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model of this config; layers that are neither full nor sliding stay transformers' own."""
    cache = DynamicCache(config=config)
    is_chunked = getattr(config.get_text_config(decoder=True), "attention_chunk_size", None) is not None
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer and not is_chunked:
            cache.layers[number] = GrowingWindowLayer(layer.sliding_window)
    return cache


def is_growing(cache: DynamicCache) -> bool:
    """True when every layer can be taken over and can drop columns."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def move_lines(cache: DynamicCache, targets: Tensor, sources: Tensor, count: int) -> None:
    """Lines `sources` take the places `targets`, and the first `count` lines are left.

    Args:
        cache: changed in place.
        targets: (n,) int64, below `count`.
        sources: (n,) int64.
        count: lines that stay.
    """
    keep = torch.arange(count, device=targets.device)
    keep[targets] = sources
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.move_lines(targets, sources, count)
        else:
            layer.batch_select_indices(keep)


def expanded(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A new cache whose lines are these lines of `cache`, copied once; one may be named several times.

    Args:
        cache: it stays as it is if `is_growing`, and may not be used again otherwise.
        rows: (B,) int64.
    """
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    new.batch_select_indices(rows)
    return new


def _with_room(states: Tensor, columns: int, rows: Tensor | None = None) -> Tensor:
    """A copy of (B, heads, T, size) states, or of these rows of it, with space for `columns` more and some to spare."""
    _, heads, length, size = states.shape
    # On a CPU attention reads past gaps between lines at up to half the speed (measured), so there they are kept small.
    spare = length // 64 + 4 if states.device.type == "cpu" else length // 8 + 64
    lines = len(states) if rows is None else len(rows)
    buffer = states.new_empty(lines, heads, length + columns + spare, size)
    buffer[:, :, :length] = states if rows is None else states[rows]
    return buffer
