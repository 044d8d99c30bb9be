"""`kdrl replay` on what a real run left behind."""

from __future__ import annotations

import json

import pytest

from kdrl_pl.__main__ import main
from kdrl_pl.replay.stored import load_rollout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rollouts of the debug config, constant normaliser, rows of both kept."""
    root = tmp_path_factory.mktemp("runs")
    small = ["--model.normaliser=constant", "--data.val=null", "--model.distillation.coef=0.2", "--run.name=r"]
    assert main(["fit", "--config=configs/debug.yaml", f"--run.root={root}", *small]) == 0
    (folder,) = root.glob("r/*")
    return folder


def test_a_run_is_replayed_at_its_newest_student(run, tmp_path, capsys):
    output = tmp_path / "replay.json"
    asked = ["--estimators", "k2", "full", "--masks", "none", "response", "--output", str(output)]
    assert main(["replay", str(run), *asked]) == 0
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["student"] == str(run / "checkpoints/last-000002.ckpt")
    assert report["student"] in printed
    assert [entry["rollout"].rpartition("/")[2] for entry in report["rollouts"]] == [
        "000000.jsonl",
        "000001.jsonl",
        "all",
    ]
    assert [entry["groups"] for entry in report["rollouts"]] == [4, 4, 8]
    for entry in report["rollouts"]:
        rows = {(row["estimator"], row["mask"], row["coef"]): row for row in entry["rows"]}
        pairs = [("k2", "none"), ("full", "none"), ("k2", "response"), ("full", "response"), ("run", "run")]
        assert list(rows) == [(*pair, coef) for coef in (None, 0.2) for pair in pairs]
        assert rows["full", "none", None]["bias"] == rows["full", "none", None]["noise"] == 0.0
        assert rows["k2", "none", None]["bias"] > 0.01
        # The run's own term is k2 on all rows, its coefficient taken out.
        of_run = {name: value for name, value in rows["run", "run", 0.2].items() if name not in ("estimator", "mask")}
        assert of_run.items() <= rows["k2", "none", 0.2].items()
    assert "bias |mean(g - f)| / |mean f|" in printed
    assert len([line for line in printed.splitlines() if line.startswith("k2 ")]) == 3 * 2 * 2


def test_another_student_and_a_file_of_tensors(run, tmp_path, capsys):
    """A dump of a rollout that went wrong, at the student that sampled it."""
    (run / "nonfinite").mkdir()
    dump = run / "nonfinite/rollout-000000.pt"
    load_rollout([run / "rollouts/000000.jsonl"], 1.0, 32)[1].save(dump)
    output = tmp_path / "replay.json"
    first = [
        "replay",
        str(dump),
        "--student",
        "checkpoints/testbeds/arithmetic/student",
        "--estimators",
        "k2",
        "--masks",
        "none",
    ]
    assert main([*first, "--coef", "0.1", "1", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["student"] == "checkpoints/testbeds/arithmetic/student"
    (entry,) = report["rollouts"]
    assert [row["coef"] for row in entry["rows"]] == [None, None, 0.1, 0.1, 1.0, 1.0]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The same loss and gradient as the first step of the run had.
    assert main([*first, "--coef", "0.2", "--output", str(output)]) == 0
    joint = json.loads(output.read_text())["rollouts"][0]["rows"][-1]
    assert joint["loss"] == pytest.approx(metrics[0]["train/loss"], rel=1e-4)
    assert joint["grad_norm"] == pytest.approx(metrics[0]["train/grad_norm"], rel=1e-4)
    capsys.readouterr()


def test_what_is_missing_is_named(run, tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 1
    assert "no stored rollouts at" in capsys.readouterr().err
    stray = tmp_path / "a/b/000001.jsonl"
    stray.parent.mkdir(parents=True)
    stray.write_bytes((run / "rollouts/000001.jsonl").read_bytes())
    assert main(["replay", str(stray)]) == 1
    assert "lie in no run folder with a config.yaml; name student and teacher with --config" in capsys.readouterr().err
    alone = tmp_path / "grpo.yaml"
    alone.write_text("model: {student: checkpoints/testbeds/arithmetic/student, distillation: null}")
    assert main(["replay", str(stray), "--config", str(alone)]) == 1
    assert "no teacher to compare with; name one: --config FILE with model.teacher.path" in capsys.readouterr().err
    alone.write_text(
        "model: {student: checkpoints/testbeds/arithmetic/student, "
        "teacher: {path: checkpoints/testbeds/arithmetic/teacher}, normalizer: x}"
    )
    assert main(["replay", str(stray), "--config", str(alone)]) == 1
    assert "--model.normalizer; did you mean --model.normaliser?" in capsys.readouterr().err


def test_a_run_without_distillation_is_asked_what_it_would_have_been(run, tmp_path, capsys):
    config = tmp_path / "grpo.yaml"
    config.write_text("model: {distillation: null}")
    asked = ["--estimators", "k2", "--masks", "response", "--config", str(config)]
    assert main(["replay", str(run / "rollouts/000001.jsonl"), *asked]) == 0
    assert "k2         response                    -" in capsys.readouterr().out
