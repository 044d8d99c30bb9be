"""Peak bytes of a rollout by the in-process engine: its cache, what a prefill and a step take beside it.

The forward passes are the decoder's own on models without numbers; the cache's capacity is that of the cache itself,
grown one column at a time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from kdrl_pl.estimate.live_bytes import LiveBytes, fake, nbytes
from kdrl_pl.estimate.plan import Batch, Plan, model_tensors
from kdrl_pl.rollout.decoder import Decoder, Prefilled
from kdrl_pl.rollout.sampling import Sampling, next_tokens
from kdrl_pl.rollout.weights import cached_autocast, weights_in


@dataclass(frozen=True)
class RolloutBytes:
    """What a rollout takes on top of what is held.

    Args:
        weights: copies of weights in the dtype that decodes.
        cache: keys and values at their most, room to grow included.
        peak: of all at a time, those two included.
    """

    weights: int
    cache: int
    peak: int


@torch.no_grad()
def rollout(plan: Plan, batch: Batch) -> RolloutBytes:
    """Bytes of decoding these rows; the longest responses decode together.

    Args:
        plan: the run.
        batch: of training or of validation.
    """
    student = plan.module.student
    student.eval()
    dtype = None if plan.rollout_dtype is None else getattr(torch, plan.rollout_dtype)
    lines = min(batch.rows, plan.max_rows or batch.rows)
    lengths = sorted(batch.response_tokens, reverse=True)[:lines]
    with (
        LiveBytes(model_tensors(student)) as live,
        plan.precision(),
        weights_in(student.model, dtype),
        cached_autocast("cpu"),
    ):
        decoder = _decoder(plan, batch, lines)
        live.restart()
        prefilled = decoder.prefill()
        kept = _kept(prefilled)
        copies, read = live.now - kept, live.peak - live.now + kept
        columns = [_column_bytes(layer) for layer in prefilled.cache.layers]
        found = _capacities(plan, prefilled.width, {prefilled.width + n - 1 for n in lengths} | {prefilled.width})
        sizes = {
            width: [size * capacity for size, capacity in zip(columns, capacities, strict=True)]
            for width, capacities in found.items()
        }
        start = lines * sum(sizes[prefilled.width])
        # k rows are left when the k-th longest ends, and each has as many columns as it
        ends = [(k * sum(sizes[prefilled.width + n - 1]), k, n) for k, n in enumerate(lengths, 1)]
        cache, left, longest = max(ends)
        old = left * max(sizes[prefilled.width + longest - 1])
        step = _step(decoder, prefilled, left, prefilled.width + longest - 1, plan.is_ragged, live)
    if batch.is_filtered:
        step += lines * student.vocab_size * 4  # one more copy of the logits
    # Later rows' prompts are read beside the whole cache; else prompts stand there at the start only.
    beside = read if batch.rows > lines and plan.refill else 0
    peak = copies + max(read, kept + start, cache + max(step, beside, min(old, cache // 2)))
    return RolloutBytes(copies, min(cache, peak - copies), peak)


def _decoder(plan: Plan, batch: Batch, lines: int) -> Decoder:
    """A decoder that is about to read its first prompts."""
    student = plan.module.student
    sampling = Sampling(plan.sampling.temperature, max_tokens=max(batch.response_tokens))
    decoder = Decoder(student.model, student.vocab_size, [], sampling, lines, plan.refill, 1.0, None)
    lengths = [plan.prompt_tokens] * batch.prompts
    if plan.is_ragged and batch.prompts > 1:
        lengths[-1] = max(plan.prompt_tokens - 1, 1)
    decoder.prompts, decoder.group_size, decoder.keys = [[0] * length for length in lengths], batch.group, []
    decoder.waiting = deque(range(batch.rows))
    return decoder


def _kept(prefilled: Prefilled) -> int:
    """Bytes of read prompts: keys, values and the last logits."""
    states = [tensor for layer in prefilled.cache.layers for tensor in (layer.keys, layer.values)]
    return nbytes([*states, prefilled.logits])


def _column_bytes(layer: object) -> int:
    """Keys and values of one token of one row."""
    keys, values = layer.keys, layer.values  # type: ignore[attr-defined]
    return nbytes([keys[:1, :, :1], values[:1, :, :1]])


def _capacities(plan: Plan, prompt: int, widths: set[int]) -> dict[int, list[int]]:
    """Width -> columns of each layer's buffers when that many are filled, behind a prompt."""
    from kdrl_pl.rollout.kv_cache import GrowingLayer, growing_cache

    layers = growing_cache(plan.module.student.model.config).layers
    kinds: dict[tuple, list[int]] = {}  # of each kind of layer the capacities at every width from `prompt` on
    device = "cpu" if plan.is_cpu else "meta"  # on what is no CPU it grows by larger steps
    for layer in layers:
        kind = type(layer), getattr(layer, "sliding_window", None)
        if kind in kinds:
            continue
        kinds[kind] = list(range(prompt, max(widths) + 1))  # transformers' own layers have no room to spare
        if isinstance(layer, GrowingLayer):
            states = torch.zeros(1, 1, prompt, 1, device=device)
            layer.update(states, states)
            layer.batch_select_indices(torch.zeros(1, dtype=torch.int64, device=device))
            for step in range(len(kinds[kind])):
                if step:
                    layer.update(states[:, :, :1], states[:, :, :1])
                kinds[kind][step] = layer._buffers[0].shape[2]
    of_layers = [kinds[type(layer), getattr(layer, "sliding_window", None)] for layer in layers]
    return {width: [capacities[width - prompt] for capacities in of_layers] for width in widths}


def _step(decoder: Decoder, prefilled: Prefilled, lines: int, width: int, is_ragged: bool, live: LiveBytes) -> int:
    """Bytes that a step of so many lines of so many columns takes beside the cache."""
    from kdrl_pl.rollout.kv_cache import growing_cache

    like = next(iter(decoder.model.parameters()))
    cache = growing_cache(decoder.model.config)
    for layer, read in zip(cache.layers, prefilled.cache.layers, strict=True):
        _, heads, _, size = read.keys.shape
        states = fake((lines, heads, max(width - 1, 1), size), read.keys.dtype, like)
        layer.update(states, states)
        del states
        layer.batch_select_indices(torch.arange(lines))  # with room to grow, as after a prefill
    tokens = torch.zeros(lines, 1, dtype=torch.int64)
    mask = torch.ones(lines, max(width, 2), dtype=torch.bool) if is_ragged else None
    live.restart()
    before = live.now
    logits = decoder.forward(tokens[:, :1], mask, tokens + width - 1, cache)
    next_tokens(logits, torch.zeros(lines, dtype=torch.float64), decoder.sampling)
    return live.peak - before
