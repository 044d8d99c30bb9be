"""`kdrl study` for real: runs, one of them killed, one that cannot start, and the study started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kdrl_pl.__main__ import main

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/studies/smoke.yaml")
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def folders(root, arm):
    """seed -> the run folders of its runs."""
    runs = sorted((root / f"smoke/addition/{arm}").glob("seed-*"))
    return {int(run.name.split("-")[1]): sorted(run.glob("*/")) for run in runs}


def times(root):
    return {path: path.stat().st_mtime_ns for path in root.glob("smoke/addition/*/*/*/**/*")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """One seed of the smoke study, with an arm that cannot start; one run was killed behind its second rollout."""
    folder = tmp_path_factory.mktemp("study")
    content = yaml.safe_load(Path(SMOKE).read_text())
    content["seeds"] = [0]
    content["arms"]["broken"] = {"set": {"model.distillation.estimator": "k1"}}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, "-m", "kdrl_pl", "study", "--config", "study.yaml", "--root", ".", "--rollouts", "8"]
    study = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("smoke/addition/kdrl/seed-0-*/*/checkpoints/last-00000[2-7].ckpt")):
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    (lock,) = folder.glob("smoke/addition/kdrl/seed-0-*/lock")
    os.kill(int(lock.read_text()), signal.SIGKILL)
    out, err = study.communicate(timeout=180)
    return folder, study.returncode, out, err


@pytest.mark.faults
def test_a_study_carries_on_without_the_runs_that_fail(killed):
    folder, status, out, err = killed
    assert status == 1
    assert "3 runs, 0 of them finished; 2 at a time, in smoke\n" in out
    assert "FAILED    addition/kdrl/0: killed by SIGKILL" in out
    assert re.search(r"FAILED    addition/broken/0: status 1: kdrl fit: .*k1.*; log: smoke/addition/broken/", out)
    assert "finished  addition/grpo/0: pass@1 " in out
    assert err.startswith("kdrl study: 2 of 3 runs failed: addition/")
    results = json.loads((folder / "smoke/results.json").read_text())
    assert {arm: entry["seeds"] for arm, entry in results["addition"].items()} == {"grpo": [0]}


@pytest.mark.faults
def test_started_again_it_does_only_what_is_missing(killed, monkeypatch, capsys):
    """The killed run goes on behind its last checkpoint; nothing of the finished ones is touched."""
    folder = killed[0]
    monkeypatch.chdir(folder)
    before = times(folder)
    again = ["study", "--config", "study.yaml", "--root", ".", "--rollouts", "8"]
    assert main([*again, "--report-only"]) == 0
    assert "| grpo | 1 |" in capsys.readouterr().out
    assert times(folder) == before

    assert main([*again, "--only", "addition/kdrl", "addition/grpo"]) == 0
    out = capsys.readouterr().out
    assert "2 runs, 1 of them finished" in out
    assert [line for line in out.splitlines() if line.startswith("started")] == ["started   addition/kdrl/0"]
    (run,) = folders(folder, "kdrl")[0]  # gone on with, not begun again
    assert {path: time for path, time in times(folder).items() if run not in path.parents} == {
        path: time for path, time in before.items() if run not in path.parents
    }
    assert "resuming " in (run.parent / "log.txt").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout"] for row in rows if "validation" not in row] == list(range(8))

    entry = json.loads((folder / "smoke/results.json").read_text())["addition"]["kdrl"]
    summary = json.loads((run / "summary.json").read_text())
    after = summary["val"]["after"]["addition"]
    assert entry["seeds"] == [0]
    assert (entry["pass@1"][0], entry["pass@2"][0]) == (after["avg_at_k"], after["pass_at_2"])
    assert entry["tokens"][0] == summary["tokens"]
    assert 0 < entry["teacher_seconds"][0] < entry["seconds"][0] < summary["seconds"]
    assert entry["curve"][0]["rollouts"] == list(range(9))
    assert entry["curve"][0]["pass@1"][-1] == pytest.approx(entry["pass@1"][0], abs=1e-5)
    assert "| kdrl − grpo | 1 | " in (folder / "smoke/results.md").read_text()

    assert main([*again, "--only", "addition/kdrl", "--dry-run"]) == 0
    assert capsys.readouterr().out == "# addition/kdrl/0 is finished\n"


@pytest.mark.slow
def test_the_smoke_study_in_an_empty_folder(tmp_path):
    command = [sys.executable, "-m", "kdrl_pl", "study", "--config", "configs/studies/smoke.yaml"]
    ran = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "runs/studies/smoke"
    assert "| kdrl − grpo | 2 | " in (folder / "results.md").read_text()
    entries = json.loads((folder / "results.json").read_text())["addition"]
    assert [entry["seeds"] for entry in entries.values()] == [[0, 1], [0, 1]]
    starts = [curve["pass@1"][0] for entry in entries.values() for curve in entry["curve"]]
    assert starts[:2] == starts[2:]  # the same student, asked with the same random numbers


def test_a_dry_run_prints_the_commands_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "--config", SMOKE, "--dry-run", "--only", "*/grpo/1", "--threads", "2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"OMP_NUM_THREADS=2 {sys.executable} -m kdrl_pl fit --config=configs/quickstart.yaml --config="
    )
    assert "--config=configs/arms/grpo.yaml --rollout.seed 1 --data.seed 1 --run.root runs/studies/smoke/" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "no study 'none.yaml'"),
        (["--config", SMOKE, "--only", "addition/gpro"], "did you mean addition/grpo?"),
        (["--config", SMOKE, "--write", "none.md"], "no page none.md"),
        (["--config", SMOKE, "--add", "none.json"], "no results of a study at none.json"),
    ],
)
def test_a_wrong_option_is_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments, "--report-only"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("kdrl study: ") and message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_the_parent_loads_nothing_heavy(tmp_path):
    code = "import sys; from kdrl_pl.__main__ import main; status = main(sys.argv[1:]); "
    code += (
        "sys.exit(status or ', '.join({'torch', 'lightning', 'transformers', 'matplotlib'} & set(sys.modules)) or None)"
    )
    command = [sys.executable, "-c", code, "study", "--config", SMOKE, "--dry-run"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
