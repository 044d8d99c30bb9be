"""How rows become forward passes: the shift by one, and micro-batches within a token budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PASS_TOKENS = (
    256  # what one more pass costs, in tokens: about 2 ms of a tiny model on a CPU, 20 ms of a big one on a GPU
)


def predicting_positions(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the model says something about the masked tokens: `(rows, columns, columns - 1)`, each (N,) int64.

    The one place where the shift by one happens: token `(row, column)` is predicted from the hidden state at
    `(row, column - 1)`; everywhere else position t speaks of `input_ids[:, t]`.

    Args:
        mask: (B, T) bool, never True at column 0.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    return rows, columns, columns - 1


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row numbers cut into micro-batches of at most `max_tokens` tokens, padding counted; longest rows first.

    Rows of like length stand together, and a cut is made where it saves more padding than a pass costs. A row longer
    than the budget is a micro-batch of its own.

    Args:
        lengths: tokens per row.
        max_tokens: budget of rows times longest row.
    """
    blocks = [Block([row], 0, length) for row, length in enumerate(lengths)]
    return [_rows(batch) for batch in cut(blocks, max_tokens)]


def group_batches(
    prompt_lengths: Sequence[int], response_lengths: Sequence[int], group: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """The same where a forward pass reads the prompt of a group once: rows of a group stay together.

    A group that does not fit into one pass is cut, and its prompt read in each part.

    Args:
        prompt_lengths, response_lengths: tokens per row.
        group: rows with the same number that stand next to each other share their prompt.
        max_tokens: budget of groups times longest prompt plus rows times longest response.
    """
    return [_rows(batch) for batch in cut(_groups(prompt_lengths, response_lengths, group, max_tokens), max_tokens)]


def sharing_pays(
    prompt_lengths: Sequence[int], response_lengths: Sequence[int], group: Sequence[int], max_tokens: int
) -> bool:
    """Whether reading each group's prompt once costs at most four fifths of reading every row whole.

    Both counted in tokens, padding and the cost of passes included. Small savings are left: with a prompt in the cache
    attention needs a mask, for which there is no fastest path.
    """
    alone = [
        Block([row], 0, prompt + response)
        for row, (prompt, response) in enumerate(zip(prompt_lengths, response_lengths, strict=True))
    ]
    together = _groups(prompt_lengths, response_lengths, group, max_tokens)
    costs = [
        sum(_tokens(batch) + passes * PASS_TOKENS for batch in cut(blocks, max_tokens))
        for blocks, passes in ((together, 2), (alone, 1))
    ]
    return costs[0] <= 0.8 * costs[1]


class Block(NamedTuple):
    """Rows that go through a pass together: one row, or the rows of a group with their common prompt.

    Args:
        rows: row numbers.
        prompt: tokens of the prompt that they share, 0 where each brings its own.
        width: tokens of the longest row, without that prompt.
    """

    rows: list[int]
    prompt: int
    width: int


def cut(blocks: Sequence[Block], max_tokens: int) -> list[list[Block]]:
    """Blocks, widest first, cut into passes at the least cost: their tokens with padding, and `PASS_TOKENS` each."""
    blocks = sorted(blocks, key=lambda block: (-block.width, -block.prompt, block.rows))
    n = len(blocks)
    prompt = torch.tensor([block.prompt for block in blocks])
    rows = torch.tensor([len(block.rows) for block in blocks])
    best, end = torch.zeros(n + 1, dtype=torch.int64), [n] * n  # cost of blocks i ... n-1; where their first pass ends
    for i in range(n - 1, -1, -1):
        until = min(i + max(max_tokens // max(blocks[i].width, 1), 1), n)  # no pass from i holds more blocks
        widest = prompt[i:until].cummax(0).values * torch.arange(1, until - i + 1)
        tokens = widest + rows[i:until].cumsum(0) * blocks[i].width  # (until - i,) of a pass over blocks i ... i+k
        fitting = max(int((tokens <= max_tokens).sum()), 1)  # tokens rise with k; a block goes alone whatever its size
        cost = tokens[:fitting] + PASS_TOKENS + best[i + 1 : i + 1 + fitting]
        longest = fitting - 1 - int(cost.flip(0).argmin())  # of equal cuts the one with the fullest first pass
        best[i], end[i] = cost[longest], i + 1 + longest
    passes, start = [], 0
    while start < n:
        passes.append(blocks[start : end[start]])
        start = end[start]
    return passes


def _groups(
    prompt_lengths: Sequence[int], response_lengths: Sequence[int], group: Sequence[int], max_tokens: int
) -> list[Block]:
    blocks: list[Block] = []
    for _, members in itertools.groupby(range(len(group)), key=lambda row: group[row]):
        rows = sorted(members, key=lambda row: (-response_lengths[row], row))
        prompt = prompt_lengths[rows[0]]
        while rows:
            width = response_lengths[rows[0]]
            fitting = max((max_tokens - prompt) // max(width, 1), 1)
            blocks.append(Block(rows[:fitting], prompt, width))
            rows = rows[fitting:]
    return blocks


def _rows(blocks: Sequence[Block]) -> list[int]:
    return [row for block in blocks for row in block.rows]


def _tokens(blocks: Sequence[Block]) -> int:
    return len(blocks) * max(b.prompt for b in blocks) + len(_rows(blocks)) * max(b.width for b in blocks)


def update_rows(group: Tensor, groups_per_update: int | None, world_size: int = 1) -> list[Tensor]:
    """Row numbers of each optimizer step of one pass over a rollout: whole groups, in their order.

    Ranks hold every `world_size`-th group, so update j covers the same groups whatever the number of ranks.

    Args:
        group: (B,) int64, rows of a group stand next to each other.
        groups_per_update: groups of one step over all ranks; None = all.
        world_size: number of ranks.

    Returns:
        per update the (rows,) int64 row numbers on this rank.

    Raises:
        ValueError: the groups cannot be divided evenly.
    """
    index = group.unique_consecutive(return_inverse=True)[1]
    groups = int(index[-1]) + 1 if len(index) else 0
    if groups_per_update is None or groups == 0:
        return [torch.arange(len(group))]
    if groups_per_update % world_size or (groups * world_size) % groups_per_update:
        raise ValueError(
            f"groups_per_update is {groups_per_update} with {groups * world_size} prompts per rollout on {world_size} "
            "ranks; it must divide the prompts of a rollout and be a multiple of the number of ranks"
        )
    update = (index // (groups_per_update // world_size)).cpu()
    return [(update == j).nonzero().flatten() for j in range(int(update[-1]) + 1)]
