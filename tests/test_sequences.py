"""The shift by one, and micro-batches."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from kdrl_pl.sequences import (
    PASS_TOKENS,
    Block,
    cut,
    group_batches,
    micro_batches,
    predicting_positions,
    sharing_pays,
    update_rows,
)


def test_a_token_is_predicted_from_the_position_before_it() -> None:
    # Red: shift to the wrong side, no shift, or rows and columns swapped.
    mask = torch.tensor(
        [
            [False, False, True, True],
            [False, True, False, False],
            [False, False, False, False],
        ]
    )
    rows, columns, before = predicting_positions(mask)
    assert rows.tolist() == [0, 0, 1]
    assert columns.tolist() == [2, 3, 1]
    assert before.tolist() == [1, 2, 0]


def test_no_masked_token_no_position() -> None:
    assert [p.tolist() for p in predicting_positions(torch.zeros(2, 3, dtype=torch.bool))] == [[], [], []]


def test_longest_rows_first_within_the_budget() -> None:
    # Red: counting real tokens instead of rows x longest row (9 + 9 fill the budget of 18), rows lost, order.
    # 9: two rows of width 9 = 18. Then 5, 4, 4: three rows of width 5 = 15, and 2 alone: 17 tokens; 5, 4 and 4, 2: 18.
    assert micro_batches([4, 9, 2, 5, 9, 4], 18) == [[1, 4], [3, 0, 5], [2]]


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    # Red: it is dropped, or shares its micro-batch with short rows.
    assert micro_batches([3, 50, 3], 10) == [[1], [0, 2]]


def test_equal_lengths_keep_their_order() -> None:
    # Red: an unstable order, which two ranks or a resumed run would not repeat.
    assert micro_batches([2] * 5, 4) == [[0, 1], [2, 3], [4]]


def test_no_rows_no_micro_batch() -> None:
    assert micro_batches([], 10) == []


def least_cost(blocks: list[Block], budget: int) -> int:
    """Over all ways to cut the sorted blocks, tried one by one."""
    blocks, best = sorted(blocks, key=lambda b: (-b.width, -b.prompt, b.rows)), []
    for cuts in itertools.product([False, True], repeat=len(blocks) - 1):
        passes, cost = [[blocks[0]]], 0
        for block, is_cut in zip(blocks[1:], cuts, strict=True):
            if is_cut:
                passes.append([])
            passes[-1].append(block)
        for members in passes:
            tokens = len(members) * max(b.prompt for b in members)
            tokens += sum(len(b.rows) for b in members) * max(b.width for b in members)
            cost += tokens + PASS_TOKENS if tokens <= budget or len(members) == 1 else 10**9
        best.append(cost)
    return min(best)


def cost_of(passes: list[list[Block]]) -> int:
    total = 0
    for members in passes:
        rows = sum(len(b.rows) for b in members)
        total += PASS_TOKENS + len(members) * max(b.prompt for b in members) + rows * max(b.width for b in members)
    return total


@pytest.mark.parametrize("seed", range(8))
def test_no_other_cut_costs_less(seed: int) -> None:
    # Red: a greedy cut, padding of prompts or responses not counted, a pass over the budget, a block lost.
    draw, rows = random.Random(seed), itertools.count()
    blocks = [
        Block([next(rows) for _ in range(draw.randint(1, 4))], draw.choice([0, 5, 300]), draw.randint(1, 400))
        for _ in range(9)
    ]
    passes = cut(blocks, 4000)
    assert sorted(row for members in passes for b in members for row in b.rows) == list(range(next(rows)))
    assert cost_of(passes) == least_cost(blocks, 4000)


def test_a_cut_is_made_where_it_saves_more_than_a_pass_costs() -> None:
    # Together 4 rows of width 400 = 1600 tokens; apart 2 x 400 + 2 x 10 = 820, and one more pass (256).
    assert micro_batches([400, 10, 400, 10], 16384) == [[0, 2], [1, 3]]
    # Here padding costs 2 x 100 = 200, less than a pass.
    assert micro_batches([400, 300, 400, 300], 16384) == [[0, 2, 1, 3]]


def test_a_group_stays_together_and_pays_its_prompt_once() -> None:
    # Red: rows of a group torn apart, the prompt counted per row. 10 + 3 x 5 = 25 per group, two of them fit into 50.
    prompts, responses, group = [10] * 9, [5, 1, 2] * 3, [7, 7, 7, 3, 3, 3, 9, 9, 9]
    assert group_batches(prompts, responses, group, 50) == [[0, 2, 1, 3, 5, 4], [6, 8, 7]]


def test_a_group_that_is_too_big_is_cut_and_pays_its_prompt_twice() -> None:
    # Red: rows lost, or the prompt left out of the second part. 20 + 2 x 15 = 50; a third row would make 65.
    assert group_batches([20] * 4, [15] * 4, [0] * 4, 50) == [[0, 1], [2, 3]]
    assert group_batches([60] * 2, [15] * 2, [0] * 2, 50) == [[0], [1]]  # no part fits: one row each


def test_sharing_pays_where_prompts_are_long() -> None:
    # 2 groups of 8: apart 16 x (512 + 64) = 9216 and a pass; together 2 x 512 + 16 x 64 = 2048 and two passes.
    group = [0] * 8 + [1] * 8
    assert sharing_pays([512] * 16, [64] * 16, group, 16384)
    assert not sharing_pays([16] * 16, [512] * 16, group, 16384)  # 8448 against 8224: under a fifth
    assert not sharing_pays([512] * 16, [64] * 16, list(range(16)), 16384)  # nobody shares
    # Rows of a group stay together, so uneven ones are padded: apart 8 x 420 + 8 x 30, together 16 x 400 + 40.
    assert not sharing_pays([20] * 16, [400, 10] * 8, group, 16384)


def updates(group: list[int], groups_per_update: int | None, world_size: int = 1) -> list[list[int]]:
    rows = update_rows(torch.tensor(group, dtype=torch.int64), groups_per_update, world_size)
    return [of_update.tolist() for of_update in rows]


def test_an_update_is_made_of_whole_groups_in_their_order() -> None:
    # Red: groups cut in two, sorted by number, or counted in rows.
    group = [7, 7, 7, 2, 9, 9, 4, 4]
    assert updates(group, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert updates(group, 1) == [[0, 1, 2], [3], [4, 5], [6, 7]]
    assert updates(group, 4) == updates(group, None) == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_update_j_covers_the_same_groups_on_any_number_of_ranks() -> None:
    # Red: groups_per_update taken per rank. Global groups 0 1 2 3; rank 0 holds 0 and 2, rank 1 holds 1 and 3.
    assert updates([0, 0, 1, 1, 2, 2, 3, 3], 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert updates([0, 0, 2, 2], 2, world_size=2) == updates([1, 1, 3, 3], 2, world_size=2) == [[0, 1], [2, 3]]


def test_an_empty_rank_takes_part_in_one_empty_update() -> None:
    assert updates([], 2) == [[]]


@pytest.mark.parametrize(("groups_per_update", "world_size"), [(3, 1), (8, 1), (3, 2), (1, 2)])
def test_groups_that_cannot_be_divided_are_refused(groups_per_update: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"groups_per_update is {groups_per_update} with {4 * world_size} prompts"):
        updates([0, 1, 2, 3], groups_per_update, world_size)
