import random

import pytest
import torch
from transformers import Gemma3TextConfig, Llama4TextConfig, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kdrl_pl.rollout.kv_cache import GrowingLayer, GrowingWindowLayer, expanded, growing_cache, is_growing


def states(rows, tokens):
    return torch.randn(rows, 2, tokens, 3), torch.randn(rows, 2, tokens, 5)


@pytest.mark.parametrize("seed", range(5))
def test_holds_what_a_dynamic_layer_holds(seed):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    ours, theirs, rows = GrowingLayer(), DynamicLayer(), 4
    for step in range(300):
        action = choose.choice(["append"] * 20 + ["select", "repeat", "crop", "reorder"]) if step else "append"
        if action == "append":
            new = states(rows, choose.choice([1, 1, 1, 9]))
            for one, two in zip(ours.update(*new), theirs.update(*new), strict=True):
                assert torch.equal(one, two)
        elif action == "select":
            picked = torch.tensor([choose.randrange(rows) for _ in range(choose.choice([2, 4, 6]))])
            rows = len(picked)
        elif action == "repeat" and rows < 8:
            rows *= 2
        for layer in (ours, theirs):
            if action == "select":
                layer.batch_select_indices(picked)
            elif action == "repeat" and layer.keys.shape[0] < rows:
                layer.batch_repeat_interleave(2)
            elif action == "crop":
                layer.crop(-1 if layer.get_seq_length() > 1 else 0)
            elif action == "reorder":
                layer.reorder_cache(torch.arange(rows).flip(0))
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_tokens_are_appended_in_place():
    layer = GrowingLayer()
    layer.update(*states(2, 10))
    places = set()
    for _ in range(1000):
        layer.update(*states(2, 1))
        places.add(layer.keys.data_ptr())
    assert layer.get_seq_length() == 1010
    assert len(places) <= 150  # five or more columns at a time, growing by a sixty-fourth; not one copy per token


@pytest.mark.parametrize("window", [2, 5, 70])
def test_windows_hold_what_transformers_hold(window):
    ours, theirs = GrowingWindowLayer(window), DynamicSlidingWindowLayer(window)
    for new in [9, *[1] * 200]:
        assert ours.get_mask_sizes(new) == theirs.get_mask_sizes(new)
        appended = states(3, new)
        for one, two in zip(ours.update(*appended), theirs.update(*appended), strict=True):
            assert torch.equal(one, two)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("window", [None, 2, 5, 12])
@pytest.mark.parametrize("seed", range(3))
def test_lines_change_hands(window, seed):
    """Against plain lists of tokens: each line a list, all right-aligned, of which a window sees the last ones."""
    torch.manual_seed(seed)
    choose = random.Random(seed)
    held = 10**6 if window is None else window - 1

    def make():
        return GrowingLayer() if window is None else GrowingWindowLayer(window)

    def read(rows, tokens):
        layer, new = make(), states(rows, tokens)
        layer.update(*new)
        return layer, [[new[0][row, :, column] for column in range(tokens)] for row in range(rows)]

    layer, lines = read(4, 9)
    layer.batch_select_indices(torch.tensor([0, 1, 1, 2, 3, 3]))
    lines = [list(lines[row]) for row in (0, 1, 1, 2, 3, 3)]
    for _ in range(200):
        action = choose.choice(["append"] * 12 + ["take over"] * 3 + ["move", "drop"])
        if action == "append":
            new = states(len(lines), 1)
            returned = layer.update(*new)[0]
            for row, line in enumerate(lines):
                line.append(new[0][row, :, 0])
                known = line[-min(len(line), held + 1) :]
                assert torch.equal(returned[row, :, -len(known) :], torch.stack(known, 1))
        elif action == "take over":
            tokens = choose.randint(1, min(20, min(map(len, lines))))
            other, their = read(3, tokens)
            taken, rows = choose.sample(range(len(lines)), min(2, len(lines))), [2, 0]
            layer.take_over(torch.tensor(taken), other, torch.tensor(rows[: len(taken)]))
            for line, row in zip(taken, rows, strict=False):
                lines[line] = list(their[row])
        elif action == "move" and len(lines) > 2:
            lines[0] = lines.pop()
            layer.move_lines(torch.tensor([0]), torch.tensor([len(lines)]), len(lines))
        elif action == "drop":
            unused = layer.get_seq_length() - max(map(len, lines))
            layer.drop_columns(unused)
            assert layer.get_seq_length() == max(map(len, lines))
    assert layer.keys.untyped_storage().nbytes() < 30_000  # not every column there ever was


def test_a_batch_leaves_the_prompts_it_was_made_of_alone():
    cache = growing_cache(LlamaConfig(num_hidden_layers=2))
    for layer in cache.layers:
        layer.update(*states(2, 4))
    before = [layer.keys.clone() for layer in cache.layers]
    batch = expanded(cache, torch.tensor([1, 0]))
    for layer in batch.layers:
        layer.update(*states(2, 1))
        layer.take_over(torch.tensor([0]), layer, torch.tensor([1]))
    assert [layer.get_seq_length() for layer in cache.layers] == [4, 4]
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_which_layers_are_ours():
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    cache = growing_cache(config)
    assert [type(layer) for layer in cache.layers] == [GrowingWindowLayer, GrowingLayer] and is_growing(cache)
    assert [type(layer) for layer in growing_cache(LlamaConfig(num_hidden_layers=2)).layers] == [GrowingLayer] * 2
    # Chunks begin at multiples of their size, windows at the token: transformers' own layers stay.
    chunked = Llama4TextConfig(num_hidden_layers=4, attention_chunk_size=8)
    assert not is_growing(growing_cache(chunked))
