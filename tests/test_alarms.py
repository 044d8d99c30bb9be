"""Alarms: a literal series that raises each, the nearest one that does not, and the quick start, which raises none."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from tiny_run import fit, make_data, make_module

from kdrl_pl.alarms import RULES, WINDOW, Alarm, Alarms
from kdrl_pl.metric_names import is_known

ROOT = Path(__file__).parents[1]


def rollouts(*parts: tuple[int, dict], **always) -> list[dict]:
    """Rows of so many rollouts with these metrics, one part after the other."""
    metrics = [values for count, values in parts for _ in range(count)]
    return [{"rollout": k, **always, **values} for k, values in enumerate(metrics)]


def validations(*scores: float) -> list[dict]:
    return [{"rollout": 10 * n, "validation": n, "val/avg_at_k": score} for n, score in enumerate(scores)]


def alarms_of(rows: list[dict]) -> list[Alarm]:
    alarms = Alarms()
    return [alarm for row in rows for alarm in alarms.observe(row)]


def raised(rows: list[dict]) -> list[tuple[int, str]]:
    return [(alarm.rollout, alarm.code) for alarm in alarms_of(rows)]


SILENT = {"train/pg_coef": 1.0, "train/kd_coef": 0.1}
# code -> (rows that raise it, at which rollout, rows that just do not)
CASES = {
    # 0.96 of 25 groups is 24 of 25
    "K001": (
        rollouts((10, {"rollout/groups_no_signal": 0.96}), **SILENT),
        9,
        rollouts((10, {"rollout/groups_no_signal": 0.95}), **SILENT),
    ),
    # means of ten: 0.2, then 0.3 is 1.5 times as much and 0.1 more, reached when all ten are 0.3
    "K002": (
        rollouts((10, {"teacher/reverse_kl": 0.2}), (10, {"teacher/reverse_kl": 0.30001}), **SILENT),
        19,
        rollouts((10, {"teacher/reverse_kl": 0.2}), (10, {"teacher/reverse_kl": 0.29}), **SILENT),
    ),
    "K003": (
        rollouts((10, {"rollout/truncated": 0.31})),
        9,
        rollouts((10, {"rollout/truncated": 0.29})),
    ),
    # a tenth of 0.4 is 0.04; at 0.0399 nats in all of the last ten it is below
    "K004": (
        rollouts((10, {"rollout/entropy": 0.4}), (10, {"rollout/entropy": 0.0399})),
        19,
        rollouts((10, {"rollout/entropy": 0.4}), (10, {"rollout/entropy": 0.0401})),
    ),
    "K005": (
        rollouts((10, {"train/sign_conflict": 0.61})),
        9,
        rollouts((10, {"train/sign_conflict": 0.59})),
    ),
    # three times 0.001; the mean of the last ten passes 0.003 when all are 0.0031
    "K006": (
        rollouts((10, {"rollout/sampler_drift_mean": 0.001}), (10, {"rollout/sampler_drift_mean": 0.00301})),
        19,
        rollouts((10, {"rollout/sampler_drift_mean": 0.001}), (10, {"rollout/sampler_drift_mean": 0.0029})),
    ),
    "K007": (
        rollouts((10, {"rollout/length": 100}), (10, {"rollout/length": 150}), **{"reward/correct": 0.5}),
        19,
        rollouts((10, {"rollout/length": 100}), (10, {"rollout/length": 149}), **{"reward/correct": 0.5}),
    ),
    "K008": (
        [{"rollout": k, "train/skipped_steps": skipped} for k, skipped in enumerate([0, 1, 2, 3])],
        3,
        [{"rollout": k, "train/skipped_steps": k // 5} for k in range(40)],  # two in ten rollouts
    ),
    "K009": (
        rollouts((10, {"train/kd_to_rl": 10.1})),
        9,
        rollouts((10, {"train/kd_to_rl": 9.9})),
    ),
    "K010": (
        rollouts((10, {"reward/unparsable": 0.5})),
        9,
        rollouts((10, {"reward/unparsable": 0.49, "reward/errors": 0.04})),
    ),
    "K011": (
        validations(0.5, 0.6, 0.49),
        20,
        validations(0.5, 0.6, 0.51),
    ),
}


def test_behind_a_mask_teacher_and_reward_disagree_by_choice() -> None:
    # Only wrong responses are distilled: the teacher likes most of their tokens, and the reward none.
    said = {
        share: alarms_of(rollouts((10, {"train/sign_conflict": 0.61, "teacher/kd_tokens": share})))
        for share in (0.94, 0.96)
    }
    assert [alarm.code for alarm in said[0.96]] == ["K005"]
    assert said[0.94] == []


@pytest.mark.parametrize("code", RULES)
def test_each_alarm_is_raised_and_just_not(code: str) -> None:
    loud, rollout, quiet = CASES[code]
    assert raised(loud) == [(rollout, code)]
    assert raised(quiet) == []


def test_a_reward_that_fails_is_an_alarm_where_every_answer_is_read() -> None:
    (alarm,) = alarms_of(rollouts((10, {"reward/unparsable": 0.0, "reward/errors": 0.05})))
    assert (alarm.code, alarm.message) == ("K010", "the reward failed on 5% of the responses of the last 10 rollouts")
    assert raised(rollouts((10, {"reward/unparsable": 0.0, "reward/errors": 0.049}))) == []


def test_where_reinforcement_learning_is_off_it_needs_no_signal() -> None:
    rows = rollouts((20, {"rollout/groups_no_signal": 1.0, "train/kd_coef": 1.0, "train/pg_coef": 0.0}))
    assert raised(rows) == []


def test_growing_longer_and_better_is_no_alarm() -> None:
    short, long = {"rollout/length": 100, "reward/correct": 0.4}, {"rollout/length": 200, "reward/correct": 0.41}
    assert raised(rollouts((10, short), (10, long))) == []


def test_a_solved_task_may_lose_its_entropy() -> None:
    rows = rollouts((10, {"rollout/entropy": 0.4}), (10, {"rollout/entropy": 0.001}), **{"reward/correct": 0.95})
    assert raised(rows) == []


def test_an_alarm_comes_once_and_again_only_after_it_was_gone() -> None:
    """Truncation is high in rollouts 0-14 and from 40 on; its mean over ten falls below 0.3 at rollout 21 (3 of 10)."""
    high, low = {"rollout/truncated": 1.0}, {"rollout/truncated": 0.0}
    rows = rollouts((15, high), (25, low), (20, high))
    assert raised(rows) == [(9, "K003"), (42, "K003")]
    flicker = rollouts((15, high), (9, low), (20, high))  # gone for fewer than ten rollouts
    assert raised(flicker) == [(9, "K003")]


def test_a_metric_that_most_rollouts_lack_says_nothing() -> None:
    rows = [{"rollout": k, **({"train/kd_to_rl": 99.0} if k % 3 == 0 else {})} for k in range(30)]
    assert raised(rows) == []


def test_numbers_that_are_not_finite_count_as_missing() -> None:
    """In memory they are NaN or infinite, in metrics.jsonl null: both runs, resumed and not, must see the same."""
    live = rollouts((10, {"rollout/truncated": 0.4}), (10, {"rollout/truncated": math.inf}))
    stored = [{k: v if v != math.inf else None for k, v in row.items()} for row in live]
    assert raised(live) == raised(stored) == [(9, "K003")]


def test_the_state_follows_from_the_rows() -> None:
    """Cut anywhere, read again and continued: the same alarms at the same rollouts."""
    rows = rollouts(
        (12, {"rollout/truncated": 0.5}), (25, {"rollout/truncated": 0.0}), (14, {"rollout/truncated": 0.9})
    )
    whole = alarms_of(rows)
    assert len(whole) == 2
    for cut in range(len(rows)):
        alarms = Alarms()
        before = [alarm for row in rows[:cut] for alarm in alarms.observe(row)]
        after = [alarm for row in rows[cut:] for alarm in alarms.observe(row)]
        assert before + after == whole


def test_the_quick_start_raises_none() -> None:
    stored = json.loads((Path(__file__).with_name("quickstart_metrics.json")).read_text())
    rows = []
    for k in range(120):
        numbers = {name: v[k] if isinstance(v, list) else v for name, v in stored["rollouts"].items()}
        rows.append({"rollout": k, **numbers})
        rows += [
            {"rollout": k, "validation": 0, "val/avg_at_k": score} for at, score in stored["validations"] if at == k
        ]
    assert len(rows) == 124
    assert raised(rows) == []


def test_every_rule_reads_metrics_that_exist() -> None:
    text = (ROOT / "kdrl_pl/alarms.py").read_text()
    names = set(re.findall(r'"((?:rollout|train|reward|teacher|val)/[a-z_]+)"', text))
    assert len(names) >= 12
    assert [name for name in names if not is_known(name)] == []


def test_every_code_has_a_section_in_the_documentation() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert re.findall(r"^## (K\d{3}):", page, re.MULTILINE) == sorted(RULES)
    assert f"last {WINDOW} rollouts" in page


def test_a_resumed_run_has_the_alarms_of_one_that_was_not_stopped(tmp_path, tiny_models) -> None:
    """Twelve tokens are never enough for a random student: K003 is raised at rollout 9, before the stop at 11."""

    def run(folder, rollouts, resume=None):
        module = make_module(*tiny_models)
        fit(folder, module, make_data(val=0), max_rollouts=rollouts, resume=resume, val_check_interval=100)
        return (folder / "alarms.jsonl").read_bytes()

    whole = run(tmp_path / "whole", 12)
    assert [json.loads(line)["code"] for line in whole.splitlines()][:1] == ["K003"]
    assert set(json.loads(whole.splitlines()[0])) == {"rollout", "code", "message", "cure"}
    run(tmp_path / "parts", 11)
    with (tmp_path / "parts/alarms.jsonl").open("a") as file:
        file.write('{"rollout": 11, "code": "K001", "message": "of a rollout that the checkpoint lacks", "cure": ""}\n')
    assert run(tmp_path / "parts", 12, resume=tmp_path / "parts/checkpoints/last-000011.ckpt") == whole
