"""Masks, padding, end tokens and indexing of `Experience`, on ragged rows of every make."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import EOS, ragged_rows

from kdrl_pl.experience import _TENSORS, Experience
from kdrl_pl.sequences import predicting_positions


def rows_of(experience: Experience) -> list[tuple]:
    """Every row as its masks read it."""
    rows = []
    for i in range(len(experience)):
        prompt = experience.attention_mask[i] & ~experience.response_mask[i]
        ids = experience.input_ids[i]
        rows.append((ids[prompt].tolist(), ids[experience.response_mask[i]].tolist(), experience.uids[i]))
    return rows


def with_weights(rows: dict) -> Experience:
    """Per-token and per-row numbers that say which row and column they belong to."""
    experience = Experience.from_rows(**rows)
    place = torch.arange(experience.input_ids.numel(), dtype=torch.float32).view(experience.input_ids.shape)
    experience.kd_weights = torch.where(experience.response_mask, place, 0.0)
    experience.token_weights = place[:, 0]
    return experience


@given(ragged_rows(), st.sampled_from([0, EOS]))
def test_rows_come_back_as_they_went_in_whatever_pads_them(rows, pad):
    experience = Experience.from_rows(**rows, pad_token_id=pad)
    read = rows_of(experience)
    assert [row[0] for row in read] == rows["prompts"]
    assert [row[1] for row in read] == rows["responses"]  # the end token too, also where it is the padding token
    assert experience.response_lengths.tolist() == [len(r) for r in rows["responses"]]
    assert experience.prompt_lengths.tolist() == [len(p) for p in rows["prompts"]]
    assert experience.input_ids.shape[1] == max(
        len(p) + len(r) for p, r in zip(rows["prompts"], rows["responses"], strict=True)
    )
    assert bool((experience.input_ids[~experience.attention_mask] == pad).all())


@given(ragged_rows())
def test_every_response_token_is_predicted_once_from_the_token_before_it(rows):
    experience = Experience.from_rows(**rows)
    number, column, before = predicting_positions(experience.response_mask)
    told = [
        (i, len(prompt) + t)
        for i, (prompt, response) in enumerate(zip(rows["prompts"], rows["responses"], strict=True))
        for t in range(len(response))
    ]
    assert list(zip(number.tolist(), column.tolist(), strict=True)) == told
    assert torch.equal(before, column - 1) and bool((before >= 0).all())
    assert bool(experience.attention_mask[number, before].all())


@given(ragged_rows(), st.data())
def test_picked_rows_bring_what_is_theirs_and_no_common_padding(rows, data):
    experience = with_weights(rows)
    picked = data.draw(st.lists(st.integers(0, len(experience) - 1), min_size=1, max_size=6))
    part = experience[picked]
    assert rows_of(part) == [rows_of(experience)[i] for i in picked]
    assert part.input_ids.shape[1] == int(part.attention_mask.sum(1).max())
    width = part.input_ids.shape[1]
    assert torch.equal(part.kd_weights, experience.kd_weights[picked, :width])
    assert torch.equal(part.token_weights, experience.token_weights[picked])
    chosen = torch.zeros(len(experience), dtype=torch.bool)
    chosen[picked] = True
    assert rows_of(experience[chosen]) == rows_of(experience[sorted(set(picked))])
    assert rows_of(experience[1:]) == rows_of(experience)[1:]


@given(ragged_rows(), st.randoms(use_true_random=False))
def test_an_order_undone_is_the_order_that_was(rows, random):
    experience = with_weights(rows)
    order = list(range(len(experience)))
    random.shuffle(order)
    back = experience[order][[order.index(i) for i in range(len(order))]]
    for name in _TENSORS:
        old, new = getattr(experience, name), getattr(back, name)
        assert (old is None and new is None) or torch.equal(old, new)


@given(rows=ragged_rows(), temperature=st.sampled_from([0.5, 1.0]))
def test_saved_rows_are_the_same_bits(tmp_path_factory, rows, temperature):
    path = tmp_path_factory.getbasetemp() / "rows.pt"
    experience = with_weights({**rows, "temperature": temperature, "stop_cell": (1, 3), "max_response_tokens": 7})
    experience.old_logprobs = torch.where(experience.response_mask, -torch.inf, 0.0)
    experience.save(path)
    read = Experience.load(path)
    assert (read.uids, read.temperature, read.stop_cell, read.max_response_tokens) == (
        *(experience.uids, temperature, (1, 3)),
        7,
    )
    for name in _TENSORS:
        old, new = getattr(experience, name), getattr(read, name)
        assert (old is None and new is None) or (old.dtype == new.dtype and torch.equal(old, new))


def is_a_row(attention: tuple[bool, ...], response: tuple[bool, ...]) -> bool:
    """[prompt, response, padding], where a response has a prompt before it."""
    return any(
        attention == (True,) * (p + r) + (False,) * (4 - p - r)
        and response == (False,) * p + (True,) * r + (False,) * (4 - p - r)
        for p in range(5)
        for r in range(5 - p)
        if p or not r
    )


def test_of_all_masks_of_four_tokens_only_rows_are_taken():
    one = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "rewards": torch.zeros(1), "group": torch.zeros(1).long()}
    taken = 0
    for bits in itertools.product([False, True], repeat=8):
        masks = {"attention_mask": torch.tensor([bits[:4]]), "response_mask": torch.tensor([bits[4:]])}
        if is_a_row(bits[:4], bits[4:]):
            Experience(**one, **masks)
            taken += 1
        else:
            with pytest.raises(ValueError, match=r"position 0|padding|ends before"):
                Experience(**one, **masks)
    assert taken == 11  # prompts of 1 to 4 tokens with 0 to 3 behind them, and the row of padding
