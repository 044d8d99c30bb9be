"""The stop tokens of student and teacher as one cell, wherever the two are compared (METHOD §1).

A student that ends with one id and a teacher that ends with another mean the same thing, but `d` of the sampled end
token is an artefact, and a sum over the vocabulary punishes the mass of stopping at every position. So the ids that end
a response, of either model, count as one word whose probability is the sum of theirs; every other word is a cell of its
own. It must be the same set of ids for both: of two different partitions no divergence can be formed, while of one it
is never above that of the words. What reinforcement learning sees stays the token itself.

With sampled forms the cell's gradient stands under the token's ratio `rho`: on average over the tokens of the cell that
is `p(cell) f(d) grad log p(cell)`, the divergence of the cells exactly.

Where every model has one and the same end token there is no cell and nothing is done. Otherwise reading a token costs a
few columns of the chunk's log-probs, and a whole vocabulary one copy of the chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kdrl_pl.logprobs import Vocabulary

log = logging.getLogger(__name__)

CELL = "cell_logprobs"  # the reading's name
ABSENT = -1e4  # nats of an id whose probability went into the cell: e^-1e4 is 0, and unlike infinity it has differences


def stop_cell(student: Iterable[int], teacher: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The ids that end a response of one model or the other, sorted; empty where that is one id, and no cell is needed.

    Args:
        student, teacher: their stop ids.
        vocab_size: ids from here on are nobody's words (a default that a config was left with).
    """
    ours, theirs = ({token for token in ids if token < vocab_size} for ids in (student, teacher))
    ids = tuple(sorted(ours | theirs))
    if len(ids) < 2:
        return ()
    log.info(
        "responses end with %s (student) and %s (teacher): student and teacher are compared with these as one word",
        sorted(ours),
        sorted(theirs),
    )
    return ids


def cell_logprobs(vocabulary: Vocabulary, stops: Sequence[int]) -> Tensor:
    """(N,) float32 nats of the cells of the sampled tokens: of all `stops` together where one of them was sampled."""
    ids = torch.tensor(stops, device=vocabulary.tokens.device)
    token = vocabulary.logprobs.gather(1, vocabulary.tokens[:, None])[:, 0]  # (N,)
    stop = vocabulary.logprobs[:, ids].logsumexp(1)  # (N,)
    return torch.where(torch.isin(vocabulary.tokens, ids), stop, token)


def merged(vocabulary: Vocabulary, stops: Sequence[int]) -> Vocabulary:
    """The same positions with the cell in the place of the first stop id; the other stop ids have no mass left."""
    ids = torch.tensor(stops, device=vocabulary.tokens.device)

    def merge(logprobs: Tensor) -> Tensor:
        cell = logprobs[:, ids].logsumexp(1, keepdim=True)  # (N, 1)
        return logprobs.index_fill(1, ids, ABSENT).index_copy(1, ids[:1], cell)

    return Vocabulary(
        merge(vocabulary.logprobs),
        torch.where(torch.isin(vocabulary.tokens, ids), ids[0], vocabulary.tokens),
        None if vocabulary.teacher is None else merge(vocabulary.teacher),
    )
