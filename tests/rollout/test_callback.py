"""The rollout callback through a real run: who is asked when."""

from __future__ import annotations

import json
import threading

import pytest
from tiny_run import fit, make_module, make_rollouts, metrics_rows

from kdrl_pl.losses import Distillation
from kdrl_pl.rewards import RewardOutput


class Parity:
    """Judges by the number of response tokens; remembers the thread it was called from."""

    def __init__(self, runs_in_workers: bool) -> None:
        self.runs_in_workers = runs_in_workers
        self.in_main_thread: set[bool] = set()

    def __call__(self, completions) -> RewardOutput:
        self.in_main_thread.add(threading.current_thread() is threading.main_thread())
        correct = [len(completion.token_ids) % 2 == 0 for completion in completions]
        return RewardOutput([float(c) for c in correct], correct)


@pytest.mark.parametrize("mask", ["none", "response"])
def test_workers_judge_while_the_teacher_scores_and_nothing_else_changes(mask, tiny_models, tmp_path) -> None:
    # Red: rewards that never reach the experience, a teacher asked twice or about the wrong tokens, a mask that was
    # made before the verdicts were in.
    logs = {}
    for in_workers in (False, True):
        reward = Parity(in_workers)
        module = make_module(*tiny_models, distillation=Distillation(0.1, mask=mask))
        fit(tmp_path / str(in_workers), module, rollouts=make_rollouts(reward=reward), max_rollouts=3)
        logs[in_workers] = metrics_rows(tmp_path / str(in_workers))
        rows = [json.loads(line) for line in (tmp_path / str(in_workers) / "metrics.jsonl").read_text().splitlines()]
        assert all(row["time/reward"] >= 0 for row in rows if "time/reward" in row)
        assert (False in reward.in_main_thread) == in_workers
    assert any("teacher/reverse_kl" in row for row in logs[True])
    assert logs[True] == logs[False]
