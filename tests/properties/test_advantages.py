"""Advantages against the group: centred, of unit scale, blind to shifts, scales, order and to rows left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrl_pl.advantages import group_advantages, groups_with_signal

REWARD = st.integers(-8, 8).map(lambda n: n / 4)
GROUPS = st.lists(st.lists(REWARD, min_size=2, max_size=6), min_size=1, max_size=4)
SCALE = st.sampled_from(["std", "none"])


def flat(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    rewards = torch.tensor([reward for group in groups for reward in group])
    return rewards, torch.tensor([number for number, group in enumerate(groups) for _ in group])


@given(GROUPS, SCALE)
def test_each_group_is_centred_and_of_unit_scale(groups, scale):
    rewards, group = flat(groups)
    advantages = group_advantages(rewards, group, scale).double()
    for number, of_group in enumerate(groups):
        ours = advantages[group == number]
        assert float(ours.sum()) == pytest.approx(0.0, abs=1e-5)
        if len(set(of_group)) == 1:
            assert ours.tolist() == [0.0] * len(of_group)
        elif scale == "std":
            assert float(ours.std()) == pytest.approx(1.0, rel=1e-4)
        order = sorted(range(len(of_group)), key=of_group.__getitem__)
        assert ours[order].tolist() == sorted(ours.tolist())  # the better reward never has the smaller advantage


@given(GROUPS, st.integers(1, 9), st.integers(-9, 9))
def test_another_unit_and_another_zero_of_the_reward_change_nothing(groups, unit, zero):
    rewards, group = flat(groups)
    advantages = group_advantages(rewards, group)
    moved = group_advantages(rewards * unit + zero, group)
    assert moved.tolist() == pytest.approx(advantages.tolist(), rel=1e-4, abs=1e-6)


@given(GROUPS, SCALE, st.randoms(use_true_random=False))
def test_order_and_names_of_groups_change_nothing(groups, scale, random):
    rewards, group = flat(groups)
    order = list(range(len(rewards)))
    random.shuffle(order)
    advantages = group_advantages(rewards, group, scale)
    shuffled = group_advantages(rewards[order], 7 - group[order], scale)
    assert shuffled.tolist() == pytest.approx(advantages[order].tolist(), rel=1e-6, abs=1e-7)
    assert torch.equal(groups_with_signal(shuffled, group[order]), groups_with_signal(advantages, group)[order])


@given(GROUPS, SCALE, st.data())
def test_rows_that_are_not_counted_have_no_say(groups, scale, data):
    rewards, group = flat(groups)
    counted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards))))
    advantages = group_advantages(rewards, group, scale, counted=counted)
    assert not advantages[~counted].any()
    other = group_advantages(torch.where(counted, rewards, 99.0), group, scale, counted=counted)
    assert torch.equal(advantages, other)
    for number in range(len(groups)):
        left = (group == number) & counted
        if int(left.sum()) >= 2:
            alone = group_advantages(rewards[left], group[left], scale)
            assert advantages[left].tolist() == pytest.approx(alone.tolist(), abs=1e-6)
        else:
            assert not advantages[group == number].any()
