"""How alike student and teacher rank the words: a diagnostic, logged where the teacher's vocabulary is at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_pl.logprobs import Vocabulary

OVERLAP = "top_k_overlap"  # the reading's name
WORDS = 8


@torch.no_grad()
def top_k_overlap(vocabulary: Vocabulary) -> Tensor:
    """(N,) share of the student's `WORDS` likeliest words that are among the teacher's, without gradient.

    It costs two searches for the largest `WORDS` of each row of a chunk that is there anyway.
    """
    words = min(WORDS, vocabulary.logprobs.shape[1])
    ours, theirs = (x.topk(words).indices for x in (vocabulary.logprobs, vocabulary.teacher))  # (N, WORDS) each
    return (ours[:, :, None] == theirs[:, None, :]).any(2).to(vocabulary.logprobs.dtype).mean(1)
