"""The prompt of a group, read once: its keys and values are handed to every response, gradients included.

The rows [prompt, response] of a group differ only behind the prompt. So one pass reads the prompts of the groups, its
cache is repeated for the rows, and a second pass reads the responses. Token for token it is the same computation as
that of whole rows; G prompts less one are saved in student scoring, teacher scoring and the update alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Body = Callable[..., Tensor]  # (input_ids, **arguments of the model's forward) -> (B, T, H)


@dataclass
class SharedPrompts:
    """Which rows share their prompt.

    Args:
        group: (B,) int64, neighbours with the same number have the same prompt.
        prompt_lengths: (B,) int64, tokens of it.
    """

    group: Tensor
    prompt_lengths: Tensor


def can_share(model: PreTrainedModel) -> bool:
    """Whether the model can read responses behind a cached prompt: a decoder whose layers are all full attention.

    A window that slides counts cache columns, and those differ between the two forms.
    """
    arguments = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    if "past_key_values" not in arguments or "position_ids" not in arguments:
        return False
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return set(layers) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None


def hidden_before(body: Body, input_ids: Tensor, rows: Tensor, before: Tensor, shared: SharedPrompts) -> Tensor:
    """(N, H) hidden states at the positions `(rows, before)`.

    Args:
        body: the model without its head; takes `past_key_values`, `attention_mask` and `position_ids`.
        input_ids: (B, T) int64, [prompt, response, padding].
        rows, before: (N,) int64.
        shared: which rows share their prompt.

    Raises:
        ValueError: two rows of a group have different prompts.
    """
    from transformers import DynamicCache

    lengths = shared.prompt_lengths  # (B,)
    number, sizes = shared.group.unique_consecutive(return_inverse=True, return_counts=True)[1:]  # (B,), (P,)
    first = sizes.cumsum(0) - sizes  # (P,) first row of each group
    width = int(lengths.max())
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    in_prompt = column[:width] < lengths[:, None]  # (B, width)
    prompts = input_ids[first, :width]  # (P, width), padded on the right with what stands there: the mask is causal
    same = (prompts[number] == input_ids[:, :width]) | ~in_prompt
    if not bool(same.all() & (lengths == lengths[first][number]).all()):
        raise ValueError("rows of one group have different prompts; rows with the same group number share theirs")

    cache = DynamicCache(config=None)
    hidden = body(prompts, past_key_values=cache, use_cache=True).flatten(0, 1)  # (P·width, H)
    offset = before - lengths[rows]  # (N,) in the response; negative in the prompt
    # Nobody asks what follows the last token. Two passes in any case: under FSDP2 every rank must make as many.
    longest = max(int(offset.max()) + 1 if len(offset) else 0, 1)
    positions = lengths[:, None] + column[:longest]  # (B, longest)
    ids = input_ids.gather(1, positions.clamp(max=input_ids.shape[1] - 1))
    cache.batch_select_indices(number)
    mask = None
    if not bool(in_prompt.all()):  # holes between prompt and response
        mask = torch.cat([in_prompt, torch.ones_like(positions, dtype=torch.bool)], 1)  # (B, width + longest)
    responses = body(ids, past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=positions)
    place = torch.where(offset < 0, number[rows] * width + before, hidden.shape[0] + rows * longest + offset)
    return torch.cat([hidden, responses.flatten(0, 1)])[place]
