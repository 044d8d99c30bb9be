import json

import pytest

from kdrl_pl.errors import RunError
from kdrl_pl.study.plan import Run
from kdrl_pl.study.results import Results, read_run

ENV = {"cpu": {"name": "CPU A", "count": 2, "torch_threads": 1}, "devices": []}


def metrics(avg, last, **more):
    return {"avg_at_k": avg, "pass_at_1": avg, "pass_at_2": 0.5, "pass_at_4": last, "length": 20.0, **more}


def write_run(folder, rollouts=2, rows=None, after=None, before=None, env=ENV):
    folder.mkdir(parents=True)
    val = {"before": before, "after": after or {"x": metrics(0.25, 0.5), "y": metrics(0.75, 0.9, length=30.0)}}
    summary = {"val": val, "seconds": 99.0, "tokens": 640, "rollouts": rollouts}
    rows = rows or [
        {"rollout": 0, "time/step": 1.5, "time/teacher": 0.5},
        {"rollout": 0, "validation": 0, "val/avg_at_k": 0.3},
        {"rollout": 1, "time/step": 2.0, "time/teacher": 0.25},
        {"rollout": 1, "validation": 1, "val/avg_at_k": 0.5},
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "env.json").write_text(json.dumps(env))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_figures_of_a_run(tmp_path):
    """Sets count alike; the seconds are those of rollouts, without validations."""
    before = {"x": metrics(0.0, 0.5), "y": metrics(0.25, 0.5)}
    write_run(tmp_path / "2026-01-01_00-00-00", before=before)
    assert read_run(tmp_path, 2) == {
        "pass@1": 0.5,
        "pass@4": 0.7,
        "length": 25.0,
        "seconds": 3.5,
        "teacher_seconds": 0.75,
        "tokens": 640,
        "curve": {"rollouts": [0, 1, 2], "seconds": [0.0, 1.5, 3.5], "pass@1": [0.125, 0.3, 0.5]},
        "machine": "CPU A, 2 cores, 1 thread",
    }


def test_a_run_without_teacher_and_without_validation_before(tmp_path):
    rows = [{"rollout": 0, "time/step": 1.5}, {"rollout": 0, "validation": 0, "val/avg_at_k": 0.3}]
    env = {**ENV, "devices": [{"name": "GPU B"}]}
    write_run(tmp_path / "2026", rollouts=1, rows=rows, env=env)
    figures = read_run(tmp_path, 1)
    assert figures["teacher_seconds"] == 0
    assert figures["curve"] == {"rollouts": [1], "seconds": [1.5], "pass@1": [0.3]}
    assert figures["machine"] == "GPU B, CPU A, 2 cores, 1 thread"


def test_only_a_finished_run_counts_and_of_several_the_newest(tmp_path):
    assert read_run(tmp_path / "nowhere", 2) is None
    write_run(tmp_path / "2026-01-01", after={"x": metrics(0.1, 0.2)})
    write_run(tmp_path / "2026-01-02", after={"x": metrics(0.2, 0.4)})
    write_run(tmp_path / "2026-01-03", rollouts=1, after={"x": metrics(0.3, 0.6)})
    (tmp_path / "2026-01-04/checkpoints").mkdir(parents=True)
    assert read_run(tmp_path, 2)["pass@1"] == 0.2
    assert read_run(tmp_path, 3) is None


def test_a_run_that_was_not_validated(tmp_path):
    write_run(tmp_path / "2026", after={"x": {}})
    with pytest.raises(RunError, match=r"was not validated; .* data\.val"):
        read_run(tmp_path, 2)


def run_of(arm, seed, digest):
    return Run("near", arm, seed, 120, (), {}, digest)


def figures(value):
    return {"pass@1": value, "curve": {"rollouts": [0], "pass@1": [0.1]}, "machine": "CPU A"}


def made(*rows):
    results = Results()
    for arm, seed, digest, value in rows:
        results.add(run_of(arm, seed, digest), figures(value))
    return results


def shares(results, arm="kdrl"):
    entry = results.entries["near"][arm]
    return entry["digest"], dict(zip(entry["seeds"], entry["pass@1"], strict=True))


def test_lists_per_seed_are_in_the_order_of_the_seeds(tmp_path):
    results = made(("kdrl", 2, "a", 0.2), ("kdrl", 0, "a", 0.1), ("grpo", 0, "b", 0.3))
    results.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "near": {
            "kdrl": {
                "digest": "a",
                "rollouts": 120,
                "seeds": [0, 2],
                "pass@1": [0.1, 0.2],
                "curve": [{"rollouts": [0], "pass@1": [0.1]}] * 2,
                "machine": ["CPU A"] * 2,
            },
            "grpo": {
                "digest": "b",
                "rollouts": 120,
                "seeds": [0],
                "pass@1": [0.3],
                "curve": [{"rollouts": [0], "pass@1": [0.1]}],
                "machine": ["CPU A"],
            },
        }
    }
    assert Results.load(tmp_path / "r.json").entries == results.entries
    assert max(map(len, (tmp_path / "r.json").read_text().splitlines())) < 80


def test_other_seeds_and_other_arms_are_added():
    results = made(("kdrl", 0, "a", 0.1), ("kdrl", 1, "a", 0.2))
    results.merge(made(("kdrl", 1, "a", 0.9), ("kdrl", 3, "a", 0.4), ("grpo", 0, "b", 0.3)), {})
    assert shares(results) == ("a", {0: 0.1, 1: 0.9, 3: 0.4})
    assert shares(results, "grpo") == ("b", {0: 0.3})


@pytest.mark.parametrize(
    ("today", "kept"), [("old", ("old", {0: 0.1})), ("new", ("new", {5: 0.5})), ("none", ("new", {5: 0.5}))]
)
def test_figures_with_other_settings_are_never_mixed(today, kept):
    results = made(("kdrl", 0, "old", 0.1))
    results.merge(made(("kdrl", 5, "new", 0.5)), {("near", "kdrl"): today})
    assert shares(results) == kept


def test_only_figures_with_the_settings_of_the_run_are_its_own():
    results = made(("kdrl", 0, "a", 0.1))
    assert results.has(run_of("kdrl", 0, "a"))
    assert not results.has(run_of("kdrl", 0, "b"))
    assert not results.has(run_of("kdrl", 1, "a"))
    assert results.entry(run_of("kdrl", 1, "a"))["seeds"] == [0]
    results.add(run_of("kdrl", 1, "b"), figures(0.7))
    assert shares(results) == ("b", {1: 0.7})


@pytest.mark.parametrize("text", ["[1]", "{", '{"near": {"kdrl": {"seeds": [0]}}}', '{"a": 1}'])
def test_a_file_that_holds_something_else_is_left_alone(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json holds no results of a study"):
        Results.load(tmp_path / "r.json")
