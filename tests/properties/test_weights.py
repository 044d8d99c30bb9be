"""The normaliser as data: what weights add up to, and that no order, cut or number of ranks changes them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import experiences

from kdrl_pl.losses import Distillation
from kdrl_pl.losses.weights import KD_MASKS, NORMALISERS, counts, experience_weights, row_weights, thinning

EXPERIENCES = experiences()
NORMALISER = st.sampled_from(NORMALISERS)


def weigh(experience, normaliser="token", distillation=None, updates=None, reduce=lambda t: t, **more):
    experience.advantages = experience.rewards - 0.25  # some 0, some negative
    updates = [torch.arange(len(experience))] if updates is None else updates
    experience_weights(experience, updates, normaliser, distillation, reduce, **more)
    return experience


def total(experience) -> float:
    return float((experience.token_weights.double() * experience.response_lengths).sum())


@given(EXPERIENCES, NORMALISER)
def test_weights_of_all_tokens_add_up_to_one(experience, normaliser):
    tokens = int(experience.response_lengths.sum())
    rows = int((experience.response_lengths > 0).sum())
    expected = 0.0 if not tokens else tokens / (rows * 7) if normaliser == "constant" else 1.0
    assert total(weigh(experience, normaliser)) == pytest.approx(expected, rel=1e-6)


@given(EXPERIENCES)
def test_each_normaliser_treats_alike_what_its_name_says(experience):
    lengths, groups = experience.response_lengths.tolist(), experience.group.tolist()
    shares = {}
    for normaliser in NORMALISERS:
        weights = weigh(experience, normaliser).token_weights.tolist()
        shares[normaliser] = [(w, w * n, g) for w, n, g in zip(weights, lengths, groups, strict=True) if n]
        assert all(w == 0 for w, n in zip(weights, lengths, strict=True) if not n)
    for normaliser in ("token", "constant"):
        assert len({weight for weight, _, _ in shares[normaliser]}) <= 1  # every token alike
    of_rows = [share for _, share, _ in shares["sequence"]]
    assert of_rows == pytest.approx([1 / max(len(of_rows), 1)] * len(of_rows))  # every response alike
    of_groups: dict[int, float] = {}
    for _, share, group in shares["group"]:
        of_groups[group] = of_groups.get(group, 0.0) + share
    assert list(of_groups.values()) == pytest.approx([1 / max(len(of_groups), 1)] * len(of_groups))  # every group alike


@given(EXPERIENCES, NORMALISER, st.sampled_from(KD_MASKS), st.sampled_from(["all", "kept"]), st.data())
def test_the_order_of_groups_and_rows_does_not_matter(experience, normaliser, mask, kd_normaliser, data):
    distillation = Distillation(mask=mask, normaliser=kd_normaliser)
    plain = weigh(experience[:], normaliser, distillation)
    order: list[int] = []
    for group in data.draw(st.permutations(sorted(set(experience.group.tolist())))):
        rows = (experience.group == group).nonzero().flatten().tolist()
        order += data.draw(st.permutations(rows))
    shuffled = weigh(experience[order], normaliser, distillation)
    assert torch.equal(shuffled.token_weights, plain.token_weights[order])
    assert torch.equal(shuffled.kd_weights, plain.kd_weights[order])


@given(EXPERIENCES, NORMALISER, st.sampled_from(KD_MASKS), st.sampled_from(["all", "kept"]), st.booleans())
def test_two_ranks_weigh_like_one(experience, normaliser, mask, kd_normaliser, drop):
    distillation = Distillation(mask=mask, normaliser=kd_normaliser)
    whole = weigh(experience[:], normaliser, distillation, drop_without_signal=drop)
    of_rank = [(experience.group % 2 == r).nonzero().flatten() for r in (0, 1)]
    asked: list[list[torch.Tensor]] = [[], []]

    def remember(rank):
        def reduce(t):
            asked[rank].append(t)
            return t

        return reduce

    for rank, rows in enumerate(of_rank):
        weigh(experience[rows], normaliser, distillation, reduce=remember(rank), drop_without_signal=drop)
    sums = iter([a + b for a, b in zip(*asked, strict=True)] * 2)
    for rows in of_rank:
        part = weigh(experience[rows], normaliser, distillation, reduce=lambda t: next(sums), drop_without_signal=drop)
        assert torch.equal(part.token_weights, whole.token_weights[rows])
        width = part.kd_weights.shape[1]
        assert torch.equal(part.kd_weights, whole.kd_weights[rows, :width])
        assert not whole.kd_weights[rows, width:].any()


@given(EXPERIENCES, st.sampled_from(["group", "token", "sequence"]))
def test_every_update_is_weighed_for_itself(experience, normaliser):
    first = experience.group == 0
    updates = [rows.nonzero().flatten() for rows in (first, ~first) if bool(rows.any())]
    experience = weigh(experience, normaliser, updates=updates)
    for rows in updates:
        has_tokens = bool(experience.response_lengths[rows].any())
        assert total(experience[rows]) == pytest.approx(float(has_tokens), rel=1e-6)


@given(EXPERIENCES, st.sampled_from(KD_MASKS))
def test_distilled_tokens_alone_add_up_to_one_under_kept_and_to_their_share_under_all(experience, mask):
    kept = weigh(experience[:], "token", Distillation(mask=mask, normaliser="kept")).kd_weights
    share = weigh(experience[:], "token", Distillation(mask=mask)).kd_weights
    assert torch.equal(kept != 0, share != 0) and not kept[~experience.response_mask].any()
    distilled, tokens = int((kept != 0).sum()), int(experience.response_mask.sum())
    assert float(kept.double().sum()) == pytest.approx(float(distilled > 0), rel=1e-6)
    assert float(share.double().sum()) == pytest.approx(distilled / max(tokens, 1), rel=1e-6)


@given(EXPERIENCES, st.floats(0.05, 1.0))
def test_thinned_groups_weigh_what_whole_ones_do(experience, share):
    factors = thinning(experience.rewards - 1.0, experience.group, share)
    for group in set(experience.group.tolist()):
        rows = experience.group == group
        size = int(rows.sum())
        assert float(factors[rows].sum()) == pytest.approx(size)
        if bool((experience.rewards[rows] == 1.0).all()):
            assert int((factors[rows] > 0).sum()) == math.ceil(share * size)
        else:
            assert factors[rows].tolist() == [1.0] * size


@given(EXPERIENCES)
def test_counts_of_parts_add_up(experience):
    tokens, group = experience.response_lengths, experience.group
    parts = [counts(tokens[group == g], group[group == g]) for g in set(group.tolist())]
    assert torch.equal(torch.stack(parts).sum(0), counts(tokens, group))
    assert torch.equal(row_weights("token", tokens, group, counts(tokens, group), None) > 0, tokens > 0)
