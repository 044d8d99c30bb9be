"""Normalisers and masks as data: the weight of every token in the summed loss (METHOD §1, §3).

    group     1 / (P N_g)    the paper's: every group counts the same, tokens within it too
    token     1 / N          DAPO: every token counts the same
    sequence  1 / (B |o_i|)  original GRPO: every response counts the same
    constant  1 / (B L_max)  Dr. GRPO

P groups, B rows, N tokens and N_g tokens of the group are counted over the update: all ranks, all micro-batches, end
tokens included, rows without signal included (unless the RL term is told to drop groups without one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdrl_pl.advantages import group_sum, groups_with_signal
from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import inside

if TYPE_CHECKING:
    from kdrl_pl.losses.distillation import Distillation

NORMALISERS = ("group", "token", "sequence", "constant")
KD_MASKS = ("none", "response", "group", "negative_advantage")
KD_NORMALISERS = ("all", "kept")


def counts(tokens: Tensor, group: Tensor) -> Tensor:
    """(3,) float64: groups, rows and tokens with at least one counted token; add them up over ranks.

    Args:
        tokens: (B,) int64, counted tokens per row; rows with none are not counted.
        group: (B,) int64.
    """
    has_tokens = tokens > 0
    groups = group[has_tokens].unique().numel()
    return torch.tensor([groups, int(has_tokens.sum()), int(tokens.sum())], dtype=torch.float64, device=tokens.device)


def row_weights(normaliser: str, tokens: Tensor, group: Tensor, totals: Tensor, max_tokens: int | None) -> Tensor:
    """(B,) float32 weight of each counted token of a row; 0 for rows without any.

    Args:
        normaliser: one of `NORMALISERS`.
        tokens: (B,) int64, counted tokens per row.
        group: (B,) int64; a group is whole on its rank.
        totals: (3,) groups, rows and tokens over all ranks, from `counts`.
        max_tokens: L_max, the sampler's budget; only "constant" needs it.
    """
    groups, rows, all_tokens = totals.double().clamp(min=1).unbind()
    lengths = tokens.double()
    if normaliser == "group":
        _, index = group.unique(return_inverse=True)
        of_group = group_sum(lengths, index, int(index.max()) + 1 if len(index) else 0)[index]
        weights = 1 / (groups * of_group.clamp(min=1))
    elif normaliser == "token":
        weights = (1 / all_tokens).expand_as(lengths)
    elif normaliser == "sequence":
        weights = 1 / (rows * lengths.clamp(min=1))
    elif normaliser == "constant":
        if not max_tokens:
            raise ValueError("normaliser 'constant' needs the sampler's budget: set experience.max_response_tokens")
        weights = (1 / (rows * max_tokens)).expand_as(lengths)
    else:
        raise ValueError(f"normaliser is {normaliser!r}; expected one of {', '.join(NORMALISERS)}")
    return inside(weights, tokens > 0).float()


def kd_rows(mask: str, experience: Experience) -> Tensor:
    """(B,) bool, rows that are distilled (METHOD §3). Correctness is the rule's verdict, never the shaped reward."""
    if mask == "none":
        return torch.ones_like(experience.correct)
    if mask == "response":
        return ~experience.correct
    if mask == "group":
        _, index = experience.group.unique(return_inverse=True)
        groups = int(index.max()) + 1 if len(index) else 0
        return group_sum(experience.correct.long(), index, groups)[index] == 0
    if mask == "negative_advantage":
        return experience.advantages < 0
    raise ValueError(f"mask is {mask!r}; expected one of {', '.join(KD_MASKS)}")


def thinning(advantages: Tensor, group: Tensor, share: float) -> Tensor:
    """(B,) float32 factor on the distillation weights where groups without signal distil only some of their rows.

    Such a group keeps its first `ceil(share * G)` rows, weighted by G over their number; the others get 0. Its rows
    were drawn alike and rewarded alike, so the first few are a fair sample: the expected gradient stays.

    Args:
        advantages: (B,) float.
        group: (B,) int64, whole groups.
        share: in (0, 1].
    """
    _, index, sizes = group.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[index]  # (B,) within the group
    kept = (share * sizes.double()).ceil().clamp(min=1)  # (P,)
    thinned = torch.where(place < kept[index], (sizes / kept)[index], 0.0)
    return torch.where(groups_with_signal(advantages, group), 1.0, thinned).float()


def experience_weights(
    experience: Experience,
    updates: Sequence[Tensor],
    normaliser: str,
    distillation: Distillation | None,
    all_reduce: Callable[[Tensor], Tensor],
    drop_without_signal: bool = False,
) -> None:
    """Fill in `token_weights (B,)` and `kd_weights (B, T)`, each update normalised over its own rows on all ranks.

    Args:
        experience: rows with advantages.
        updates: row numbers of each update.
        normaliser: one of `NORMALISERS`.
        distillation: its mask, gate and normaliser; None = no token is distilled.
        all_reduce: adds a tensor up over ranks.
        drop_without_signal: groups whose advantages are all 0 leave the counts of `token_weights` (DAPO's dynamic
            sampling, arXiv 2503.14476 §3.2, without new draws); `kd_weights` keep theirs.
    """
    tokens, group, budget = experience.response_lengths, experience.group, experience.max_response_tokens
    distilled = distillation.rows(experience) if distillation else torch.zeros_like(experience.correct)
    kept = torch.where(distilled, tokens, 0)
    trained = tokens
    if drop_without_signal:
        trained = torch.where(groups_with_signal(experience.advantages, group), tokens, 0)
    token_weights = torch.zeros(len(experience), dtype=torch.float32, device=experience.device)
    kd_weights = torch.zeros_like(token_weights)
    for rows in updates:
        rows = rows.to(experience.device)
        totals = all_reduce(torch.stack([counts(number[rows], group[rows]) for number in (tokens, trained, kept)]))
        token_weights[rows] = row_weights(normaliser, trained[rows], group[rows], totals[1], budget)
        if distillation is not None and distillation.normaliser == "kept":
            kd_weights[rows] = row_weights(normaliser, kept[rows], group[rows], totals[2], budget)
        else:
            of_all = row_weights(normaliser, tokens[rows], group[rows], totals[0], budget)
            kd_weights[rows] = torch.where(distilled[rows], of_all, 0.0)
    if distillation is not None and distillation.rows_without_signal < 1.0:
        kd_weights *= thinning(experience.advantages, group, distillation.rows_without_signal)
    experience.token_weights = token_weights
    experience.kd_weights = inside(kd_weights[:, None], experience.response_mask)
