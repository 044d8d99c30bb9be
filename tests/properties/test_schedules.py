"""Schedules: values that are pure and within bounds; those that listen resume at any place."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kdrl_pl.listening import KL, KLBudget, PlateauSwitch
from kdrl_pl.schedules import Constant, Cosine, Linear, Schedule, Switch, Warmup

VALUE = st.integers(-20, 20).map(lambda n: n / 8)
ROLLOUT = st.integers(0, 300)
LENGTH = st.integers(1, 200)


@st.composite
def linear(draw) -> Linear:
    floor, start = sorted([draw(VALUE), draw(VALUE)])
    return Linear(start, draw(st.integers(0, 16)) / 64, floor)


PURE: st.SearchStrategy[Schedule] = st.one_of(
    VALUE.map(Constant),
    linear(),
    st.builds(Cosine, VALUE, VALUE, LENGTH),
    st.builds(Switch, VALUE, VALUE, st.integers(0, 200)),
)


@given(PURE, st.lists(ROLLOUT, min_size=1, max_size=20), st.integers(1, 50))
def test_a_value_depends_on_the_rollout_alone(schedule, rollouts, rise):
    for one in (schedule, Warmup(rise, schedule)):
        asked = [one.value(r) for r in rollouts]
        one.observe({"val/avg_at_k": 0.5, KL: 0.1})
        assert [one.value(r) for r in reversed(rollouts)] == asked[::-1]
        assert one.state_dict() == {}


@given(linear(), ROLLOUT)
def test_linear_falls_to_its_floor_and_never_below(schedule, rollout):
    assert schedule.floor <= schedule.value(rollout + 1) <= schedule.value(rollout) <= schedule.start


@given(VALUE, VALUE, LENGTH, ROLLOUT)
def test_cosine_goes_one_way_between_its_ends(start, end, length, rollout):
    schedule = Cosine(start, end, length)
    here, there = schedule.value(rollout), schedule.value(rollout + 1)
    assert min(start, end) - 1e-12 <= here <= max(start, end) + 1e-12
    assert abs(there - end) <= abs(here - end) + 1e-12
    assert schedule.value(0) == start
    assert abs(schedule.value(length + rollout) - end) < 1e-12


@given(VALUE, VALUE, st.integers(0, 200), ROLLOUT)
def test_a_switch_has_two_values_and_one_step(before, after, at, rollout):
    assert Switch(before, after, at).value(rollout) == (before if rollout < at else after)


@given(PURE, LENGTH, ROLLOUT)
def test_a_warmup_never_exceeds_what_it_warms_up(schedule, rise, rollout):
    value, full = Warmup(rise, schedule).value(rollout), schedule.value(rollout)
    assert abs(value) <= abs(full) and value * full >= 0
    assert rollout + 1 < rise or value == full


@given(
    st.lists(st.floats(0.01, 2.0), min_size=3, max_size=3).map(sorted),
    st.floats(0.0, 2.0),
    st.floats(0.001, 50.0),
    st.lists(st.one_of(st.floats(0.0, 1e6), st.just(math.nan), st.just(math.inf), st.none()), max_size=20),
    st.integers(0, 20),
)
def test_a_budget_stays_within_its_limits_and_resumes_anywhere(limits, target, rate, kls, cut):
    low, start, high = limits
    whole, first, second = (KLBudget(start, target, rate, low, high) for _ in range(3))
    for number, kl in enumerate(kls):
        heard = {} if kl is None else {KL: kl}
        before = whole.value(number)
        whole.observe(heard)
        if number == cut:
            second.load_state_dict(first.state_dict())
        (first if number < cut else second).observe(heard)
        after = whole.value(number)
        assert low * (1 - 1e-12) <= after <= high * (1 + 1e-12)
        if kl is None or not math.isfinite(kl):
            assert after == before
        else:
            assert (after - before) * (kl - target) >= -1e-12  # it never moves the wrong way
    assert (second if len(kls) > cut else first).coef == whole.coef


@given(
    st.integers(1, 4),
    st.lists(st.one_of(st.integers(0, 8).map(lambda n: n / 8), st.just(math.nan), st.none()), max_size=20),
    st.integers(0, 20),
)
def test_a_plateau_switches_once_for_good_and_resumes_anywhere(patience, scores, cut):
    whole, first, second = (PlateauSwitch(0.0, 1.0, patience) for _ in range(3))
    values, best, waited = [], -math.inf, 0
    for number, score in enumerate(scores):
        heard = {"train/loss": 1.0} if score is None else {"val/avg_at_k": score}
        whole.observe(heard)
        if number == cut:
            second.load_state_dict(first.state_dict())
        (first if number < cut else second).observe(heard)
        if score is not None:
            best, waited = (score, 0) if score > best else (best, waited + 1)
        switched = (bool(values) and values[-1] == 1.0) or waited >= patience
        values.append(whole.value(number))
        assert values[-1] == float(switched)
    assert values == sorted(values)
    assert (second if len(scores) > cut else first).state_dict() == whole.state_dict()
