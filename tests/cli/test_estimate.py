"""`kdrl estimate`: from settings to a table, without loading or writing anything."""

import json

import pytest

from kdrl_pl.__main__ import main

QUICKSTART = ["--config", "configs/quickstart.yaml"]


def told(capsys, *arguments):
    assert main(["estimate", *QUICKSTART, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_quick_start(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = told(capsys)
    assert not list(tmp_path.iterdir())
    assert (found["layout"], found["ranks"], found["device"]) == ("single", 1, "cpu")
    assert found["tokens"]["rows"] == 256 and found["tokens"]["response"] == 256 * 40
    assert set(found["memory"]["phases"]) == {"rollout", "validation", "teacher", "update"}
    assert found["memory"]["held"]["optimizer"] == pytest.approx(8 * found["student"]["parameters"], rel=0.01)
    assert found["least_seconds"] is None


def test_settings_and_options_count(capsys):
    found = told(
        capsys, "--ranks", "4", "--trainer.strategy", "ddp", "--response-tokens", "10", "--rollout.group_size", "4"
    )
    assert (found["layout"], found["ranks"]) == ("ddp", 4)
    assert found["tokens"]["rows"] == 128 and found["tokens"]["response"] == 1280
    assert found["memory"]["held"]["gradient buckets"] == 4 * found["student"]["parameters"]
    assert list(found["work"]["update"]["sent"]) == ["all-reduce of gradients"]


def test_the_table_names_the_peak_and_bounds_times(capsys):
    rates = ["--tflops", "1", "--memory-gb-per-s", "10", "--link-gb-per-s", "1"]
    assert main(["estimate", *QUICKSTART, "--prompt-tokens", "8", *rates]) == 0
    out = capsys.readouterr().out
    assert "the peak is the " in out and "least s" in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith(("products", "memory", "link"))] == [
        "rollout",
        "teacher",
        "update",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.student", "no/such/folder"], "no model folder at 'no/such/folder'"),
        (["--ranks", "5"], "data.prompts_per_rollout is 32 on 5 ranks; it must be a multiple of them"),
        (["--ranks", "4", "--nodes", "3"], "--ranks is 4 on 3 nodes"),
        (["--tflops", "1"], "go together"),
        (["--trainer.strategy", "deepspeed"], "trainer.strategy is deepspeed"),
        (["--model.studnet", "x"], "there is no setting --model.studnet; did you mean --model.student?"),
    ],
)
def test_one_clear_error(arguments, message, capsys):
    assert main(["estimate", *QUICKSTART, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_weights_are_not_needed(capsys):
    arguments = ["--model.student", "configs/estimate/1.5b", "--model.teacher.path", "configs/estimate/7b"]
    found = told(capsys, *arguments, "--rollout.sampling.max_tokens", "8", "--model.gradient_checkpointing", "true")
    assert 1.54e9 < found["student"]["parameters"] < 1.55e9
    assert 7.61e9 < found["teachers"][0]["parameters"] < 7.63e9
