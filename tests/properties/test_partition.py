"""Rows into updates and micro-batches: nothing lost, nothing twice, within the budget, at the least cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrl_pl.sequences import PASS_TOKENS, group_batches, micro_batches, update_rows

# Multiples of one number, so that passes often fit exactly.
LENGTHS = st.lists(st.sampled_from([1, 50, 100, 150, 300]), max_size=7)
BUDGET = st.integers(1, 18).map(lambda n: 50 * n)


def padded(batch: list[int], lengths: list[int]) -> int:
    return len(batch) * max(lengths[row] for row in batch)


@given(LENGTHS, BUDGET)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = micro_batches(lengths, budget)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert padded(batch, lengths) <= budget or len(batch) == 1
    in_order = [lengths[row] for batch in batches for row in batch]
    assert in_order == sorted(lengths, reverse=True)


@given(LENGTHS.filter(bool), BUDGET)
def test_no_other_cut_of_the_sorted_rows_is_cheaper(lengths, budget):
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def cost(batches: list[list[int]]) -> int:
        return sum(padded(batch, lengths) + PASS_TOKENS for batch in batches)

    others = []
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        batches = [[rows[0]]]
        for row, is_cut in zip(rows[1:], cuts, strict=True):
            batches.append([row]) if is_cut else batches[-1].append(row)
        if all(padded(batch, lengths) <= budget or len(batch) == 1 for batch in batches):
            others.append(cost(batches))
    assert cost(micro_batches(lengths, budget)) == min(others)


@given(LENGTHS, BUDGET, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_change_the_passes(lengths, budget, random):
    shuffled = list(lengths)
    random.shuffle(shuffled)

    def passes(of: list[int]) -> list[list[int]]:
        return [[of[row] for row in batch] for batch in micro_batches(of, budget)]

    assert passes(shuffled) == passes(lengths)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(0, 40), min_size=1, max_size=4)), max_size=5),
    st.integers(1, 400),
)
def test_group_batches_hold_every_row_once_and_read_a_prompt_once_per_part(groups, budget):
    prompts = [prompt for prompt, responses in groups for _ in responses]
    responses = [response for _, of_group in groups for response in of_group]
    group = [number for number, (_, of_group) in enumerate(groups) for _ in of_group]
    batches = group_batches(prompts, responses, group, budget)
    assert sorted(itertools.chain(*batches)) == list(range(len(responses)))
    for batch in batches:
        parts = [list(rows) for _, rows in itertools.groupby(batch, key=lambda row: group[row])]
        tokens = len(parts) * max(prompts[row] for row in batch) + len(batch) * max(responses[row] for row in batch)
        assert tokens <= budget or len(batch) == 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.data())
def test_an_update_holds_the_same_whole_groups_on_any_number_of_ranks(sizes, data):
    groups = len(sizes)
    per_update = data.draw(st.sampled_from([n for n in range(1, groups + 1) if groups % n == 0]))
    ranks = data.draw(st.sampled_from([w for w in (1, 2, 3, 4) if per_update % w == 0]))
    updates: dict[int, list[int]] = {}
    for rank in range(ranks):
        mine = list(range(rank, groups, ranks))  # as the loader deals them out
        of_row = [g for g in mine for _ in range(sizes[g])]
        cut = update_rows(torch.tensor(of_row), per_update, ranks)
        assert torch.equal(torch.cat(cut), torch.arange(len(of_row)))
        for number, rows in enumerate(cut):
            updates.setdefault(number, []).extend(of_row[row] for row in rows)
    for number, rows in updates.items():
        whole = range(number * per_update, (number + 1) * per_update)
        assert sorted(rows) == [g for g in whole for _ in range(sizes[g])]


@given(st.integers(1, 12), st.integers(1, 14), st.integers(1, 4))
def test_what_does_not_divide_is_refused(groups, per_update, ranks):
    rows = torch.arange(groups)
    if per_update % ranks or (groups * ranks) % per_update:
        with pytest.raises(ValueError, match="must divide"):
            update_rows(rows, per_update, ranks)
    else:
        assert len(update_rows(rows, per_update, ranks)) == groups * ranks // per_update
    assert len(update_rows(rows, None, ranks)) == 1
