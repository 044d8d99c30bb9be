"""Peak bytes of a rollout by the in-process engine: its cache, what a prefill and a step take beside it.

The forward passes are the decoder's own on models without numbers; the cache's capacity is that of the cache itself,
grown one column at a time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from kdrl_pl.estimate.live_bytes import LiveBytes, fake, nbytes
from kdrl_pl.estimate.plan import Plan, model_tensors
from kdrl_pl.rollout.decoder import Decoder, Prefilled
from kdrl_pl.rollout.sampling import Sampling, next_tokens
from kdrl_pl.rollout.weights import cached_autocast, weights_in


@dataclass(frozen=True)
class RolloutBytes:
    """What a rollout takes on top of what is held.

    Args:
        weights: copies in the dtype that decodes.
        cache: keys and values at the end of the longest rows, space to grow included.
        prompts: keys and values of prompts whose rows wait, and of those that are being read.
        passes: what a prefill or a step takes beside them, the larger one.
        peak: of all at a time: not their sum, where they do not meet.
    """

    weights: int
    cache: int
    prompts: int
    passes: int
    peak: int


@torch.no_grad()
def rollout(plan: Plan, prompts: int, group: int, max_tokens: int, filtered: bool = False) -> RolloutBytes:
    """Bytes of decoding prompts x group rows of up to `max_tokens` tokens.

    Args:
        plan: the run.
        prompts, group, max_tokens: of this rollout; validation has its own.
        filtered: top-p, top-k or min-p: the sampler has one more copy of the logits.
    """
    student = plan.module.student
    student.eval()
    dtype = None if plan.rollout_dtype is None else getattr(torch, plan.rollout_dtype)
    lines = min(prompts * group, plan.max_rows or prompts * group)
    with LiveBytes(model_tensors(student)) as live, plan.precision():
        with weights_in(student.model, dtype), cached_autocast("cpu"):
            copies = live.now
            decoder = _decoder(plan, prompts, group, max_tokens)
            live.restart()
            prefilled = decoder.prefill()
            if plan.autocast:  # casts that are kept arise in the first pass
                copies = live.now - _kept(prefilled)
            read = live.peak - copies  # prompts' keys and values, and the pass itself
            kept = _kept(prefilled)
            per_column = [_column_bytes(layer) for layer in prefilled.cache.layers]
            capacities = _capacities(plan, prefilled.width, prefilled.width + max_tokens - 1)
            cache = lines * sum(size * columns for size, (columns, _) in zip(per_column, capacities, strict=True))
            start = lines * sum(size * columns for size, (_, columns) in zip(per_column, capacities, strict=True))
            old = lines * max(size * columns for size, (columns, _) in zip(per_column, capacities, strict=True))
            step = _step(plan, decoder, prefilled, lines, prefilled.width + max_tokens - 1, live)
    if filtered:
        step += lines * student.vocab_size * 4
    waits = prompts * group > lines
    has_refill = waits and plan.refill
    # keys and values of the prompts stand beside the whole cache where later rows wait for them, else at the start only
    beside = read if has_refill else 0
    peak = copies + max(read, kept + start, cache + max(step, beside, min(old, cache // 2)))
    return RolloutBytes(copies, cache, kept, max(read - kept, step), peak)


def _decoder(plan: Plan, prompts: int, group: int, max_tokens: int) -> Decoder:
    """A decoder that is about to read its first prompts."""
    student = plan.module.student
    lines = plan.max_rows or prompts * group
    sampling = Sampling(plan.sampling.temperature, max_tokens=max_tokens)
    decoder = Decoder(student.model, student.vocab_size, [], sampling, lines, plan.refill, 1.0, None)
    lengths = [plan.prompt_tokens] * prompts
    if plan.is_ragged and prompts > 1:
        lengths[0] = max(plan.prompt_tokens - 1, 1)
    decoder.prompts, decoder.group_size, decoder.keys = [[0] * length for length in lengths], group, []
    decoder.waiting = deque(range(prompts * group))
    return decoder


def _kept(prefilled: Prefilled) -> int:
    """Bytes of read prompts: keys, values and the last logits."""
    states = [tensor for layer in prefilled.cache.layers for tensor in (layer.keys, layer.values)]
    return nbytes([*states, prefilled.logits])


def _column_bytes(layer: object) -> int:
    """Keys and values of one token of one row."""
    keys, values = layer.keys, layer.values  # type: ignore[attr-defined]
    return nbytes([keys[:1, :, :1], values[:1, :, :1]])


def _capacities(plan: Plan, prompt: int, width: int) -> list[tuple[int, int]]:
    """Per layer: columns of its buffers when `width` of them are filled, and at the start."""
    from kdrl_pl.rollout.kv_cache import GrowingLayer, growing_cache

    found = []
    known: dict[tuple, tuple[int, int]] = {}
    for layer in growing_cache(plan.module.student.model.config).layers or []:
        kind = type(layer), getattr(layer, "sliding_window", None)
        if not isinstance(layer, GrowingLayer):
            known[kind] = width, prompt
        elif kind not in known:
            device = "cpu" if plan.is_cpu else "meta"  # it grows by larger steps on what is no CPU
            states = torch.zeros(1, 1, prompt, 1, device=device)
            layer.update(states, states)
            layer.batch_select_indices(torch.zeros(1, dtype=torch.int64, device=device))
            start = layer._buffers[0].shape[2]
            for _ in range(width - prompt):
                layer.update(states[:, :, :1], states[:, :, :1])
            known[kind] = layer._buffers[0].shape[2], start
        found.append(known[kind])
    return found


def _step(plan: Plan, decoder: Decoder, prefilled: Prefilled, lines: int, width: int, live: LiveBytes) -> int:
    """Bytes that the last step of full rows takes beside the cache."""
    from kdrl_pl.rollout.kv_cache import growing_cache

    config = plan.module.student.model.config
    like = next(iter(decoder.model.parameters()))
    cache = growing_cache(config)
    for layer, read in zip(cache.layers, prefilled.cache.layers, strict=True):
        _, heads, _, size = read.keys.shape
        states = fake((lines, heads, width - 1, size), read.keys.dtype, like)
        layer.update(states, states)
        del states
        layer.batch_select_indices(torch.arange(lines))  # with room to grow, as after a prefill
    tokens = torch.zeros(lines, 1, dtype=torch.int64)
    mask = torch.ones(lines, width, dtype=torch.bool) if plan.is_ragged else None
    live.restart()
    before = live.now
    logits = decoder.forward(tokens, mask, tokens + width - 1, cache)
    next_tokens(logits, torch.zeros(lines, dtype=torch.float64), decoder.sampling)
    return live.peak - before
