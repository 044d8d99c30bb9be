"""The forward passes of a student over the rows of a rollout: which rows go together, and their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.models.shared_prompts import SharedPrompts
from kdrl_pl.parallel import all_reduce_max
from kdrl_pl.sequences import group_batches, micro_batches
from kdrl_pl.stop_cell import CELL, cell_logprobs

if TYPE_CHECKING:
    from kdrl_pl.models.adapters import EarlierStudent


def pass_rows(experience: Experience, max_tokens: int) -> list[list[int]]:
    """Row numbers per forward pass, as many passes on every rank: idle ranks get empty ones at the end.

    Args:
        experience: rows of this rank.
        max_tokens: of a pass, padding counted.
    """
    prompts, responses = experience.prompt_lengths.tolist(), experience.response_lengths.tolist()
    if experience.share_prompts:
        batches = group_batches(prompts, responses, experience.group.tolist(), max_tokens)
    else:
        batches = micro_batches([p + r for p, r in zip(prompts, responses, strict=True)], max_tokens)
    return batches + [[]] * (all_reduce_max(len(batches), experience.device) - len(batches))


def shared_prompts(experience: Experience) -> SharedPrompts | None:
    """What a pass over these rows is told of their prompts."""
    return SharedPrompts(experience.group, experience.prompt_lengths) if experience.share_prompts else None


@torch.no_grad()
def logprobs_of(
    model: LanguageModel | EarlierStudent,
    experience: Experience,
    passes: Sequence[Sequence[int]],
    of_cells: bool = False,
) -> Tensor:
    """(B, T) float32 log-probs in nats, zero outside the response mask, no gradient.

    Args:
        model: the student, or a copy of it.
        experience: rows.
        passes: from `pass_rows`.
        of_cells: at stop tokens those of their cell, as the teacher's are.
    """
    stops = experience.stop_cell if of_cells else ()
    read = (lambda vocabulary: {CELL: cell_logprobs(vocabulary, stops)}) if stops else None
    logprobs = torch.zeros(experience.input_ids.shape, dtype=torch.float32, device=experience.device)
    for rows in passes:
        rows = rows or [0]  # an idle rank keeps in step with the others
        part = experience[rows]
        ids, mask, width = part.input_ids, part.response_mask, part.input_ids.shape[1]
        scores = model.token_logprobs(ids, mask, part.temperature, read=read, shared=shared_prompts(part))
        logprobs[rows, :width] = scores.readings.get(CELL, scores.logprobs).float()
    return logprobs
