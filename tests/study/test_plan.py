import shlex
import sys
from pathlib import Path

import pytest
import yaml

from kdrl_pl.study.config import read_study
from kdrl_pl.study.plan import plan, settings_digest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text("{}")
    files = {
        "base.yaml": {"model": {"student": "student", "gradient_clip": 1.0}, "run": {"name": "x", "max_rollouts": 30}},
        "more.yaml": {"data": {"prompts_per_rollout": 4}},
        "grpo.yaml": {"model": {"distillation": None}},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    return tmp_path


def runs_of(changes=None, **options):
    content = {
        "name": "s",
        "seeds": [0, 1],
        "testbeds": {"near": {"config": ["base.yaml"]}, "far": {"config": ["base.yaml", "more.yaml"]}},
        "arms": {"kdrl": {}, "grpo": {"config": ["grpo.yaml"], "seeds": [1, 0, 2], "testbeds": ["near"]}},
        **(changes or {}),
    }
    Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return plan(read_study("study.yaml"), **options)


def names(runs):
    return [run.name for run in runs]


def test_every_arm_has_run_before_the_next_seed_begins(folder):
    assert names(runs_of()) == [
        *("near/kdrl/0", "near/grpo/0", "far/kdrl/0"),
        *("near/kdrl/1", "near/grpo/1", "far/kdrl/1"),
        "near/grpo/2",
    ]


def test_the_command_of_a_run(folder):
    arms = {"arms": {"grpo": {"config": ["grpo.yaml"], "set": {"model.optimizer": {"lr": 1e-3}, "model.x": None}}}}
    run = runs_of(arms, only=["far/grpo/1"])[0]
    assert shlex.join(run.command(Path("runs/s"))) == (
        f"{sys.executable} -m kdrl_pl fit --config=base.yaml --config=more.yaml --config=grpo.yaml "
        "'--model.optimizer={\"lr\": 0.001}' --model.x=null --rollout.seed 1 --data.seed 1 "
        f"--run.root runs/s/far/grpo --run.name seed-1-{run.digest} --run.max_rollouts 30 --resume auto"
    )


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["near/kdrl"], ["near/kdrl/0", "near/kdrl/1"]),
        (["*/kdrl/1"], ["near/kdrl/1", "far/kdrl/1"]),
        (["near"], ["near/kdrl/0", "near/grpo/0", "near/kdrl/1", "near/grpo/1", "near/grpo/2"]),
        (["far/kdrl/0", "near/grpo/2"], ["far/kdrl/0", "near/grpo/2"]),
    ],
)
def test_only_some(folder, only, expected):
    assert names(runs_of(only=only)) == expected


def test_other_seeds(folder):
    assert names(runs_of(seeds=[7], only=["near"])) == ["near/kdrl/7", "near/grpo/7"]


def test_a_pattern_that_fits_nothing(folder):
    with pytest.raises(ValueError, match=r"no run 'near/gpro'; did you mean near/grpo\?"):
        runs_of(only=["near/gpro"])


def test_rollouts_are_the_same_for_all_arms(folder):
    """Those of the study, or those of the testbed; an arm's file cannot give itself more."""
    (folder / "grpo.yaml").write_text("run: {max_rollouts: 99}\n")
    assert {run.rollouts for run in runs_of()} == {30}
    assert {run.rollouts for run in runs_of({"rollouts": 5})} == {5}
    (folder / "base.yaml").write_text("model: {student: student}\n")
    with pytest.raises(ValueError, match=r"testbed near has no number of rollouts"):
        runs_of()


def test_a_missing_file_stops_the_study_before_its_first_run(folder):
    with pytest.raises(FileNotFoundError, match=r"no config file 'gone\.yaml'"):
        runs_of({"arms": {"kdrl": {}, "x": {"config": ["gone.yaml"]}}})


def test_what_changes_the_digest(folder):
    def digest(**changes):
        return runs_of(changes, only=["near/kdrl/0"])[0].digest

    first = digest()
    assert len(first) == 8
    assert digest(seeds=[0, 5], name="t", jobs=3) == first
    assert digest(rollouts=31) != first
    assert digest(arms={"kdrl": {"set": {"model.gradient_clip": 2.0}}}) != first
    assert digest(arms={"kdrl": {"set": {"model.gradient_clip": 1.0}}}) == first  # what the file says anyway
    (folder / "same.yaml").write_text(
        "model: {gradient_clip: 1.0}\ncheckpoint: {every_n_rollouts: 3}\nrun: {root: x}\n"
    )
    assert digest(arms={"kdrl": {"config": ["same.yaml"]}}) == first


def test_new_weights_are_another_study(tmp_path):
    def digest(weights, file="model.safetensors"):
        (tmp_path / file).write_bytes(weights)
        settings_digest.__globals__["_files_digest"].cache_clear()
        return settings_digest({"model": {"student": "org/model", "teacher": {"path": str(tmp_path)}}}, 3)

    first = digest(b"1")
    assert digest(b"2") != first
    assert digest(b"1") == first
    assert digest(b"notes", "README.md") == first


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda path: path.name)
def test_no_study_of_the_library_has_the_same_arm_twice(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arms = {(run.testbed, run.arm): (run.testbed, run.digest) for run in plan(read_study(str(path)))}
    assert len(set(arms.values())) == len(arms) > 0


def test_the_command_of_an_arm_that_imitates(folder):
    arms = {"arms": {"sft": {"sft": {"model.optimizer.init_args.lr": 1e-3}}, "other": {"sft": {"data.batch_size": 8}}}}
    run, other = runs_of(arms, only=["far/sft/1", "far/other/1"])
    assert shlex.join(run.command(Path("runs/s"))) == (
        f"{sys.executable} -m kdrl_pl.study.imitation --config=base.yaml --config=more.yaml "
        "--set=model.optimizer.init_args.lr=0.001 "
        f"--folder runs/s/far/sft/seed-1-{run.digest} --seed 1 --rollouts 30"
    )
    assert run.digest != other.digest
