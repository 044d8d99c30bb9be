import json
import sys

import pytest
import yaml

from kdrl_pl.study.config import read_study
from kdrl_pl.study.plan import plan
from kdrl_pl.study.report import Report

STUDY = {
    "name": "s",
    "rollouts": 1,
    "testbeds": {"near": {"config": ["base.yaml"]}, "far": {"config": ["base.yaml"]}},
    "arms": {"kdrl": {}, "grpo": {"set": {"model.distillation": None}}},
    "compare": [["kdrl", "grpo"]],
}
PAGE = "Prose.\n<!-- study:s table near -->\n<!-- end -->\n<!-- study:s differences near -->\n<!-- end -->\n"
PAGE += "<!-- study:s table far -->\n<!-- end -->\n<!-- study:s plot -->\n<!-- end -->\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("model: {student: org/student}\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text(PAGE)
    return tmp_path


def study_of(**changes):
    with open("study.yaml", "w") as file:
        yaml.safe_dump({**STUDY, **changes}, file, sort_keys=False)
    study = read_study("study.yaml")
    return study, plan(study)


def finish(run, root, share):
    """What `kdrl fit` leaves of a run."""
    folder = run.folder(root) / "2026-01-01_00-00-00"
    folder.mkdir(parents=True)
    metrics = {"avg_at_k": share, "pass_at_1": share, "pass_at_8": share, "length": 9.0}
    summary = {"val": {"before": {"x": metrics}, "after": {"x": metrics}}, "tokens": 10, "rollouts": 1}
    rows = [{"rollout": 0, "time/step": 1.0}, {"rollout": 0, "validation": 0, "val/avg_at_k": share}]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {"cpu": {"name": "CPU A", "count": 2, "torch_threads": 1}, "devices": []}
    (folder / "env.json").write_text(json.dumps(env))


def seeds_in(file, testbed="near", arm="kdrl"):
    entry = json.loads(file.read_text())[testbed][arm]
    return dict(zip(entry["seeds"], entry["pass@1"], strict=True))


def test_a_page_gathers_the_results_of_two_machines(folder):
    """Each machine has run folders of its own and only the page in common."""
    study, runs = study_of(seeds=[0])
    for run, share in zip(runs, (0.6, 0.5, 0.4, 0.3), strict=True):
        finish(run, folder / "a", share)
    assert Report(study, runs, folder / "a", folder / "docs/page.md").write() == []
    study, runs = study_of(seeds=[1])
    for run, share in zip(runs, (0.8, 0.6, 0.5, 0.3), strict=True):
        finish(run, folder / "b", share)
    report = Report(study, runs, folder / "b", folder / "docs/page.md")
    assert report.write() == []
    assert seeds_in(folder / "docs/s.json") == {0: 0.6, 1: 0.8}
    assert seeds_in(folder / "b/results.json", "far", "grpo") == {0: 0.3, 1: 0.3}
    page = (folder / "docs/page.md").read_text()
    assert "| kdrl | 2 | 70.0 ± 127.1 | 70.0 ± 127.1 | 9.0 ± 0.0 |" in page  # 12.706 · 0.1414 / √2
    assert "| kdrl − grpo | 2 | tie: +15.0 (−48.5 … +78.5) |" in page  # differences 0.1 and 0.2
    assert page.startswith("Prose.\n<!-- study:s table near -->\n| arm |")
    assert page.endswith(
        "<!-- study:s plot -->\n![pass@1 over rollouts and over seconds, per arm](s.svg)\n<!-- end -->\n"
    )
    assert (folder / "docs/s.svg").read_text() == (folder / "b/s.svg").read_text()


def test_seeds_that_were_run_before_are_reported_too(folder):
    study, runs = study_of(seeds=[3])
    finish(runs[0], folder / "a", 0.6)
    study, runs = study_of(seeds=[0])
    assert [run.seed for run in runs if Report(study, runs, folder / "a").results.has(run)] == []
    Report(study, runs, folder / "a").write()
    assert seeds_in(folder / "a/results.json") == {3: 0.6}


def test_results_of_other_settings_stay_until_a_run_takes_their_place(folder):
    study, runs = study_of(arms={"kdrl": {}, "old": {"set": {"model.x": 1}}}, compare=[])
    for run in runs[:2]:
        finish(run, folder / "a", 0.6)
    Report(study, runs, folder / "a").write()
    study, runs = study_of(arms={"kdrl": {"set": {"model.x": 2}}, "grpo": {}}, compare=[])
    notes = Report(study, runs, folder / "a").write()
    assert notes == [
        "near/kdrl has 1 seed with other settings; they stay until a run takes their place",
        "near/old is no arm of this study; its 1 seed stay in the JSON but not in tables",
    ]
    assert "| kdrl |" not in (folder / "a/results.md").read_text()
    assert seeds_in(folder / "a/results.json") == {0: 0.6}
    finish(runs[0], folder / "a", 0.9)
    Report(study, runs, folder / "a").write()
    assert seeds_in(folder / "a/results.json") == {0: 0.9}


def test_without_matplotlib_the_tables_are_written_and_the_note_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    study, runs = study_of()
    finish(runs[0], folder / "a", 0.6)
    (note,) = Report(study, runs, folder / "a").write()
    assert "kdrl_pl[study]" in note
    assert "| kdrl | 1 | 60.0 |" in (folder / "a/results.md").read_text()
    assert not (folder / "a/s.svg").exists()


def test_two_invocations_at_a_time_keep_what_the_other_wrote(folder):
    study, runs = study_of(seeds=[0, 1])
    first, second = (Report(study, runs, folder / root, folder / "docs/page.md") for root in "ab")
    finish(runs[0], folder / "a", 0.6)
    first.read_folder(runs[0])
    first.save()
    later = next(run for run in runs if run.name == "near/kdrl/1")
    finish(later, folder / "b", 0.8)
    second.read_folder(later)
    second.save()
    assert seeds_in(folder / "docs/s.json") == {0: 0.6, 1: 0.8}


def test_no_page(folder):
    study, runs = study_of()
    with pytest.raises(
        FileNotFoundError, match=r"no page none\.md; write one with blocks like <!-- study:s table near"
    ):
        Report(study, runs, folder / "a", folder.__class__("none.md"))
