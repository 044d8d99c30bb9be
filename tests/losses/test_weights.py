"""Normalisers and masks: literal numbers (vectors.json, V2), counts over ranks, rows without tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from kdrl_pl.experience import Experience
from kdrl_pl.losses.distillation import Distillation
from kdrl_pl.losses.weights import (
    KD_MASKS,
    NORMALISERS,
    counts,
    experience_weights,
    kd_rows,
    row_weights,
    thinning,
)

V2 = json.loads((Path(__file__).parents[1] / "vectors.json").read_text())["V2_normalisers"]
GROUP, LENGTHS, L_MAX = torch.tensor(V2["group_of_row"]), torch.tensor(V2["lengths"]), V2["L_max"]


def weights(normaliser: str, lengths: torch.Tensor = LENGTHS) -> torch.Tensor:
    return row_weights(normaliser, lengths, GROUP, counts(lengths, GROUP), L_MAX)


def summed(weights: torch.Tensor, token_loss: list[list[float]]) -> float:
    return sum(w * sum(row) for w, row in zip(weights.tolist(), token_loss, strict=True))


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_literal_weights_and_losses(normaliser: str) -> None:
    # Red: any other count: rows for groups, padded for real lengths, the group's rows for its tokens.
    got = weights(normaliser)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(V2["token_weights"][normaliser], abs=1e-6)
    assert summed(got, V2["token_loss"]) == pytest.approx(V2["loss"][normaliser], abs=1e-6)
    # Red: an average of the micro-batches' own averages.
    assert summed(got, V2["token_loss"]) != pytest.approx(V2["wrong_mean_of_micro_token_means"], abs=1e-3)


def test_kept_tokens_or_all_tokens() -> None:
    # Red: "kept" counts all tokens, or "all" the kept ones; groups without kept tokens stay in P.
    kept = LENGTHS * torch.tensor(V2["kept"]["kd_rows"])
    loss = [[V2["kept"]["per_token_k2"]] * int(n) for n in kept]
    for normaliser in ("token", "group"):
        assert summed(weights(normaliser), loss) == pytest.approx(V2["kept"][f"{normaliser}_norm_all"], abs=1e-6)
        assert summed(weights(normaliser, kept), loss) == pytest.approx(V2["kept"][f"{normaliser}_norm_kept"], abs=1e-6)
    scale = weights("token", kept)[0] / weights("token")[0]
    assert scale.item() == pytest.approx(V2["kept"]["kd_scale"], abs=1e-6)


def test_groups_and_rows_without_kept_tokens_leave_the_counts() -> None:
    # Row lengths 3, 0 | 0, 0 | 2, 4: P = 2 groups, B = 3 rows, N = 9 tokens.
    # Red: an empty group or row counted, or given a weight (1 / 0).
    lengths, group = torch.tensor([3, 0, 0, 0, 2, 4]), torch.tensor([0, 0, 1, 1, 2, 2])
    totals = counts(lengths, group)
    assert totals.tolist() == [2, 3, 9]
    expected = {
        "group": [1 / 6, 0, 0, 0, 1 / 12, 1 / 12],
        "token": [1 / 9, 0, 0, 0, 1 / 9, 1 / 9],
        "sequence": [1 / 9, 0, 0, 0, 1 / 6, 1 / 12],
        "constant": [1 / 15, 0, 0, 0, 1 / 15, 1 / 15],
    }
    for normaliser, values in expected.items():
        assert row_weights(normaliser, lengths, group, totals, 5).tolist() == pytest.approx(values), normaliser


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_two_ranks_weigh_their_rows_as_one_process_does(normaliser: str) -> None:
    # Red: local instead of global counts; group numbers of one rank mistaken for those of another.
    # Each rank numbers its groups from 0: group 0 here is another one than group 0 there.
    lengths, group = torch.tensor([5, 1, 2, 2, 7, 3]), torch.tensor([0, 0, 1, 1, 2, 2])
    alone = row_weights(normaliser, lengths, group, counts(lengths, group), 9)
    ranks = [(lengths[:2], group[:2]), (lengths[2:], group[2:] - 1)]
    totals = sum(counts(*rank) for rank in ranks)
    spread = [row_weights(normaliser, *rank, totals, 9) for rank in ranks]
    assert torch.equal(torch.cat(spread), alone)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_rank_without_tokens_has_weights_zero(normaliser: str) -> None:
    # Red: the dummy row of an idle rank moves the weights, or is a division by zero.
    nothing = torch.zeros(1, dtype=torch.int64)
    totals = counts(nothing, nothing)
    assert totals.tolist() == [0, 0, 0]
    assert row_weights(normaliser, nothing, nothing, totals, 4).tolist() == [0.0]
    assert row_weights(normaliser, nothing[:0], nothing[:0], totals, 4).shape == (0,)


def test_group_numbers_need_no_order() -> None:
    # Red: neighbours or ranges taken for groups. Group 9 has 3 + 4 tokens, group 4 has 1.
    lengths, group = torch.tensor([3, 1, 4]), torch.tensor([9, 4, 9])
    got = row_weights("group", lengths, group, counts(lengths, group), None)
    assert got.tolist() == pytest.approx([1 / 14, 1 / 2, 1 / 14])


def verdicts() -> Experience:
    """Four groups of two: one right, both right, none right, none right; rewards and advantages say otherwise."""
    return Experience.from_rows(
        [[1]] * 8,
        [[2]] * 8,
        [0.2, 0.9, -1.0, 0.0, 1.0, 0.4, 0.0, 0.0],
        [5, 5, 1, 1, 3, 3, 8, 8],
        correct=[True, False, True, True, False, False, False, False],
        advantages=torch.tensor([-0.7, 0.7, -0.7, 0.7, 0.7, -0.7, 0.0, 0.0]),
    )


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("none", [1, 1, 1, 1, 1, 1, 1, 1]),
        ("response", [0, 1, 0, 0, 1, 1, 1, 1]),
        ("group", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("negative_advantage", [1, 0, 1, 0, 0, 1, 0, 0]),
    ],
)
def test_rows_that_are_distilled(mask: str, expected: list[int]) -> None:
    # Red: correctness read off the shaped reward; "group" = groups with an incorrect response; <= 0 for < 0, which
    # would turn "negative_advantage" on in groups of equal rewards.
    got = kd_rows(mask, verdicts())
    assert got.dtype == torch.bool
    assert got.int().tolist() == expected


def test_every_mask_takes_no_rows() -> None:
    for mask in KD_MASKS:
        assert kd_rows(mask, verdicts()[0:0]).shape == (0,)


def test_bad_names_and_a_missing_budget_are_named() -> None:
    with pytest.raises(ValueError, match=r"'mean'.*group, token, sequence, constant"):
        weights("mean")
    with pytest.raises(ValueError, match="max_response_tokens"):
        row_weights("constant", LENGTHS, GROUP, counts(LENGTHS, GROUP), None)
    with pytest.raises(ValueError, match=r"'correct'.*none, response, group, negative_advantage"):
        kd_rows("correct", verdicts())


def four_rows() -> Experience:
    """The rows of V2 with a prompt each; rows 1 and 2 are correct."""
    return Experience.from_rows(
        [[1]] * 4,
        [[2] * n for n in V2["lengths"]],
        [0.0] * 4,
        V2["group_of_row"],
        correct=[not kept for kept in V2["kept"]["kd_rows"]],
        max_response_tokens=L_MAX,
    )


def fill(distillation: Distillation | None, updates: list[list[int]], normaliser: str) -> Experience:
    experience = four_rows()
    experience_weights(experience, [torch.tensor(rows) for rows in updates], normaliser, distillation, lambda t: t)
    return experience


def test_mask_and_normaliser_are_folded_into_the_weights() -> None:
    # Red: a weight on prompt or padding, on rows that are not distilled, or the kept normaliser in the RL term.
    e = fill(Distillation(mask="response", normaliser="kept"), [[0, 1, 2, 3]], "token")
    assert e.token_weights.tolist() == pytest.approx([0.1] * 4)
    assert (e.token_weights.dtype, e.kd_weights.dtype) == (torch.float32, torch.float32)
    seventh = 1 / 7
    expected = [[0, seventh, seventh, seventh, 0], [0] * 5, [0] * 5, [0, seventh, seventh, seventh, seventh]]
    assert e.kd_weights.flatten().tolist() == pytest.approx(sum(expected, []))  # noqa: RUF017
    e = fill(Distillation(mask="response", normaliser="all"), [[0, 1, 2, 3]], "token")
    assert e.kd_weights.sum(1).tolist() == pytest.approx([0.3, 0.0, 0.0, 0.4])


def test_without_distillation_no_token_is_distilled() -> None:
    e = fill(None, [[0, 1, 2, 3]], "group")
    assert e.kd_weights.tolist() == [[0.0] * 5] * 4
    assert e.token_weights.tolist() == pytest.approx(V2["token_weights"]["group"], abs=1e-6)


def test_each_update_counts_its_own_rows() -> None:
    # Red: one count for the whole rollout: two updates would then take half a step each.
    e = fill(Distillation(mask="response", normaliser="kept"), [[0, 1], [2, 3]], "sequence")
    assert e.token_weights.tolist() == pytest.approx([1 / 6, 1 / 2, 1 / 4, 1 / 8])
    assert e.kd_weights[:, 1].tolist() == pytest.approx([1 / 3, 0.0, 0.0, 1 / 4])


def test_counts_come_from_all_ranks() -> None:
    # Red: the sum over ranks forgotten for the kept tokens. A second rank with the same rows doubles every count.
    experience = four_rows()
    term = Distillation(mask="response", normaliser="kept")
    experience_weights(experience, [torch.arange(4)], "token", term, lambda totals: 2 * totals)
    assert experience.token_weights.tolist() == pytest.approx([1 / 20] * 4)
    assert experience.kd_weights[:, 1].tolist() == pytest.approx([1 / 14, 0.0, 0.0, 1 / 14])


def test_groups_without_signal_leave_the_counts_of_the_policy_gradient_alone() -> None:
    # Rows of 3, 1, 2, 4 tokens in groups 0, 0, 1, 1; group 1 has equal rewards. Red: kd_weights shrunk as well, a row
    # exactly at the mean dropped from a group that has a signal, P, B or N of all groups.
    expected = {
        "group": [1 / 4, 1 / 4, 0, 0],
        "token": [1 / 4, 1 / 4, 0, 0],
        "sequence": [1 / 6, 1 / 2, 0, 0],
        "constant": [1 / (2 * L_MAX), 1 / (2 * L_MAX), 0, 0],
    }
    for normaliser, weights_of_rows in expected.items():
        for kd_normaliser in ("all", "kept"):
            kept, dropped = four_rows(), four_rows()
            term = Distillation(mask="response", normaliser=kd_normaliser)
            for e, drop in ((kept, False), (dropped, True)):
                e.advantages = torch.tensor([0.5, -0.5, 0.0, 0.0])
                experience_weights(e, [torch.arange(4)], normaliser, term, lambda totals: totals, drop)
            assert dropped.token_weights.tolist() == pytest.approx(weights_of_rows), normaliser
            assert torch.equal(dropped.kd_weights, kept.kd_weights)


def test_an_update_of_groups_without_signal_only_has_weights_zero() -> None:
    e = four_rows()
    e.advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])
    updates = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    experience_weights(e, updates, "token", None, lambda totals: totals, True)
    assert e.token_weights.tolist() == pytest.approx([1 / 4, 1 / 4, 0, 0])


# ---- fewer rows in groups without signal -----------------------------------------------------------------------------

# Group 0 has signal, groups 1 (four rows) and 2 (three) have none.
ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
OF_GROUP = torch.tensor([5, 5, 2, 2, 2, 2, 9, 9, 9])


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (0.5, [1, 1, 2, 2, 0, 0, 1.5, 1.5, 0]),  # 2 of 4, 2 of 3
        (0.25, [1, 1, 4, 0, 0, 0, 3, 0, 0]),
        (0.01, [1, 1, 4, 0, 0, 0, 3, 0, 0]),  # one row at least
    ],
)
def test_some_rows_of_groups_without_signal_stand_for_all(share: float, expected: list[float]) -> None:
    # Red: groups with signal thinned, weights not raised, places counted over the batch or over sorted group numbers.
    assert thinning(ADVANTAGES, OF_GROUP, share).tolist() == expected


def test_over_all_orders_of_a_group_every_row_weighs_one() -> None:
    # The rows of a group are drawn alike, so every order is equally likely. Red: the expected gradient changes.
    total = torch.zeros(4)
    for order in itertools.permutations(range(4)):
        total[list(order)] += thinning(torch.zeros(4), torch.zeros(4, dtype=torch.int64), 0.5)
    assert (total / 24).tolist() == [1.0] * 4


def test_thinned_weights_keep_the_normaliser() -> None:
    # Group 0 right and wrong, group 1 all wrong; tokens 1, 2, 3, 4: token normaliser 1/10. Row 2 stands for row 3.
    e = Experience.from_rows([[1]] * 4, [[2] * n for n in (1, 2, 3, 4)], [1.0, 0.0, 0.0, 0.0], [0, 0, 1, 1])
    e.advantages = torch.tensor([0.7, -0.7, 0.0, 0.0])
    term = Distillation(1.0, rows_without_signal=0.5)
    experience_weights(e, [torch.arange(4)], "token", term, lambda x: x)
    assert e.kd_weights.amax(1).tolist() == pytest.approx([0.1, 0.1, 0.2, 0.0])
    assert not term.asks_about_all
    with pytest.raises(ValueError, match="rows_without_signal is 0"):
        Distillation(1.0, rows_without_signal=0)
