"""The off-policy arm, with real processes: sample the teacher, imitate, validate."""

import json

import pytest
import yaml

from kdrl_pl.study.config import read_study
from kdrl_pl.study.plan import plan
from kdrl_pl.study.results import read_run
from kdrl_pl.study.runner import execute


@pytest.mark.slow
def test_a_student_imitates_what_is_right(tmp_path):
    """Red: the student is not trained on the teacher's text, the validation is not that of the other arms, or a study
    cannot read what came of it."""
    study = {
        "name": "s",
        "testbeds": {"arithmetic": {"config": ["configs/testbeds/arithmetic.yaml"]}},
        "arms": {"sft": {"sft": {"model.optimizer.init_args.lr": 2e-3, "data.batch_size": 64}}},
        "rollouts": 8,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (run,) = plan(read_study(str(tmp_path / "study.yaml")))
    problems = []
    execute(
        [run],
        tmp_path,
        jobs=1,
        environment={"OMP_NUM_THREADS": "1"},
        started=lambda run: None,
        ended=lambda run, problem: problems.append(problem),
    )
    assert problems == [None]
    figures = read_run(run.folder(tmp_path), 8)
    assert figures["tokens"] > 8 * 32 * 8 * 20  # as many responses as eight rollouts have, of 24 tokens each
    assert figures["curve"]["rollouts"] == [0, 8]
    assert figures["curve"]["pass@1"][0] == pytest.approx(0.13, abs=0.04)
    assert round(figures["pass@1"], 5) == figures["curve"]["pass@1"][1] > 0.3
    assert 0 < figures["teacher_seconds"] < figures["seconds"]
    summary = json.loads((run.folder(tmp_path) / "run/summary.json").read_text())
    assert summary["rollouts"] == 8
    assert not (run.folder(tmp_path) / "run/teacher.jsonl").exists()  # half a gigabyte of them in a study
