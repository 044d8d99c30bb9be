"""What the display knows: times from a clock that stands where the test puts it."""

from __future__ import annotations

import pytest

from kdrl_pl.view.state import RunState, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_time_left_is_the_pace_of_this_process(clock) -> None:
    """Resumed after 40 of 100; 5 rollouts in 10 s, so 55 more take 110 s."""
    state = RunState("run", 100, clock)
    state.start(40)
    assert state.left() is None
    clock.now += 10
    for done in range(41, 46):
        state.finish(done, {})
    assert state.left() == 110.0
    state.start(0)  # a second start (after a validation) forgets nothing
    assert state.left() == 110.0


def test_without_an_end_nothing_is_left_to_say(clock) -> None:
    state = RunState("run", None, clock)
    state.start(0)
    state.finish(1, {})
    assert state.left() is None


def test_a_phase_knows_how_far_it_is(clock) -> None:
    state = RunState("run", 10, clock)
    state.begin("rollout")
    assert state.share() is None  # the first: nobody knows how long it takes
    state.finish(1, {"time/rollout": 4.0, "perf/rollout_tokens_per_s": 50.0})
    state.begin("rollout")
    clock.now += 1
    assert (state.elapsed(), state.share(), state.speed("rollout")) == (1.0, 0.25, 50.0)
    clock.now += 9
    assert state.share() == 1.0  # it takes longer than the last one
    state.begin("update")
    state.advance(3, 4)
    assert (state.elapsed(), state.share()) == (0.0, 0.75)
    clock.now += 2
    state.begin("update")  # the second update of the rollout: the same phase
    assert (state.elapsed(), state.steps) == (2.0, (0, None))


def test_what_is_over_is_what_came_before_in_this_rollout(clock) -> None:
    state = RunState("run", 10, clock)
    for phase in ("rollout", "reward", "score"):
        state.begin(phase)
    assert {"rollout", "reward"} <= state.over and "score" not in state.over and "teacher" not in state.over
    state.finish(1, {})
    state.begin("rollout")
    assert not state.over & {"rollout", "reward", "score"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (90000, "1 d 1 h")],
)
def test_duration(seconds, text) -> None:
    assert duration(seconds) == text


def test_what_a_validation_did_is_not_over_in_the_next_rollout(clock) -> None:
    # Red: a tick at the reward before the first token of the rollout is sampled.
    state = RunState("run", 10, clock)
    state.evaluate("validation before training")
    state.begin("rollout")
    state.begin("reward")
    assert state.over >= {"rollout"}
    state.evaluate("")
    state.begin("rollout")
    assert (state.doing, state.over & {"rollout", "reward"}) == ("", set())
