"""Who announces what, in which order, in a real rollout and its updates; and nothing without a listener."""

from __future__ import annotations

import pytest
from tiny_run import fit, make_data, make_module

from kdrl_pl import phases
from kdrl_pl.losses import Distillation


class Heard:
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.steps: list[tuple[str, int, int | None]] = []

    def begin(self, phase: str) -> None:
        self.phases.append(phase)

    def advance(self, done: int, total: int | None) -> None:
        self.steps.append((self.phases[-1], done, total))


@pytest.fixture
def heard():
    listener = Heard()
    phases.listen(listener)
    yield listener
    phases.listen(None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # k2 reads the teacher on every token, but only once the rows are judged: these rewards take no worker
        ({}, ["rollout", "reward", "score", "teacher", "update"]),
        ({"groups_per_update": 2}, ["rollout", "reward", "score", "teacher", "update", "update"]),
    ],
)
def test_a_rollout_announces_its_phases(tmp_path, tiny_models, heard, settings, expected) -> None:
    module = make_module(*tiny_models, distillation=Distillation(coef=0.3), max_tokens_per_micro_batch=32, **settings)
    fit(tmp_path, module, make_data(val=0), max_rollouts=1)
    assert heard.phases == expected
    of_rollout = [step for phase, step, total in heard.steps if phase == "rollout" and total is None]
    assert of_rollout == list(range(1, len(of_rollout) + 1)) and 2 <= len(of_rollout) <= 13  # prefill and 12 tokens
    of_update = [(step, total) for phase, step, total in heard.steps if phase == "update"]
    assert of_update[0][0] == 0 and all(step < total for step, total in of_update)
    assert len(of_update) > len(expected) - 4  # several micro-batches


def test_without_a_listener_the_poll_is_the_callers_own() -> None:
    def poll() -> bool:
        return False

    assert phases.counted(poll) is poll
    phases.begin("rollout")  # nobody hears it, nothing happens
    phases.advance(1)


def test_a_counted_poll_still_answers(heard) -> None:
    answers = iter([False, False, True])
    polled = phases.counted(lambda: next(answers))
    phases.begin("rollout")
    assert [polled(), polled(), polled()] == [False, False, True]
    assert heard.steps == [("rollout", 1, None), ("rollout", 2, None), ("rollout", 3, None)]
