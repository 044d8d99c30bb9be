"""kdrl report, compare and inspect, on run folders written by hand and with the tokenizer of the quick start."""

from __future__ import annotations

import json

import pytest
from run_folders import config, write_run

from kdrl_pl.__main__ import main
from kdrl_pl.files import JSONLines


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    return write_run(tmp_path / "made" / "1")


def test_report(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert capsys.readouterr().out == f"wrote {run}/report.html, {len(page.encode()) / 1000:.0f} kB\n"
    assert "‹" not in page and ">4</span>" in page  # token 6 of the tiny tokenizer
    assert main(["report", str(run), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_text() == page


def test_report_of_a_run_whose_tokenizer_has_gone(tmp_path, capsys, caplog):
    run = write_run(tmp_path / "run", settings=config(student=str(tmp_path / "gone")))
    assert main(["report", str(run)]) == 0
    assert "tokens are shown as numbers: no model folder at" in caplog.text
    assert "The student&#x27;s tokenizer was not found" in (run / "report.html").read_text()


def test_inspect(run, tmp_path, capsys):
    assert main(["inspect", str(run), "--html", str(tmp_path / "row.html")]) == 0
    out = capsys.readouterr().out
    assert "rollout 4, row 0: sums/0, right, reward 1" in out and "\n34[---!]5[++]\n" in out
    assert "  row  mean |d|  verdict   reward  tokens  prompt" in out
    page = (tmp_path / "row.html").read_text()
    assert "made/1: rollout 4, row 0" in page and 'class="t n3 clash"' in page


def test_inspect_one_row(run, capsys):
    assert main(["inspect", str(run), "--rollout", "3", "--row", "1"]) == 0
    out = capsys.readouterr().out
    assert "rollout 3, row 1: sums/1, wrong, reward 0" in out and "mean |d|  verdict" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollout", "9"], "rollout 9 is not stored in {run}; --rollout takes 3 to 4"),
        (["--row", "2"], "--row is 2; rollout 4 has rows 0 to 1"),
        (["--row", "-1"], "--row is -1; rollout 4 has rows 0 to 1"),
    ],
)
def test_inspect_of_what_is_not_there(run, capsys, arguments, message):
    assert main(["inspect", str(run), *arguments]) == 1
    assert capsys.readouterr().err == f"kdrl inspect: {message.format(run=run)}\n"


def test_inspect_without_rollouts(run, capsys):
    for file in (run / "rollouts").iterdir():
        file.unlink()
    assert main(["inspect", str(run)]) == 1
    assert "keeps no rollouts; train with --run.keep_rollouts" in capsys.readouterr().err


def test_compare(run, tmp_path, capsys):
    other = write_run(tmp_path / "other" / "1", rollouts=2)
    assert main(["compare", str(run), str(other), "--output", str(tmp_path / "compare.html")]) == 0
    out = capsys.readouterr().out
    assert "made   25.0%" in out and "other  25.0%" in out and "All settings are the same." in out
    assert "2 runs compared" in (tmp_path / "compare.html").read_text()
    assert main(["compare", str(run)]) == 1
    assert "1 run folder is given; expected at least two" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "inspect", "compare"])
def test_no_run_folder(command, tmp_path, capsys):
    arguments = [str(tmp_path / "gone")] * (2 if command == "compare" else 1)
    assert main([command, *arguments]) == 1
    assert capsys.readouterr().err == (
        f"kdrl {command}: no run folder at {tmp_path}/gone; give one like runs/quickstart/2026-01-31_12-00-00\n"
    )


def test_a_damaged_file_is_named(run, capsys):
    (run / "summary.json").write_text(json.dumps([]))
    assert main(["report", str(run)]) == 1
    assert "summary.json is damaged" in capsys.readouterr().err


def test_while_the_run_goes_on(run, capsys):
    (run / "summary.json").unlink()
    with open(JSONLines(run / "metrics.jsonl").path, "a") as file:
        file.write('{"rollout": 4, "rew')
    assert main(["report", str(run)]) == 0
    assert "Under way, or stopped: 4 of 4 rollouts" in (run / "report.html").read_text()


def test_a_training_leaves_a_report_and_its_export_a_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = ["--run.max_rollouts=2", "--data.prompts_per_rollout=2", "--rollout.group_size=2", "--trainer.logger=false"]
    assert main(["fit", "--config", "configs/debug.yaml", "--run.root=runs", "--run.name=short", *size]) == 0
    (run,) = tmp_path.glob("runs/short/*")
    page = (run / "report.html").read_text()
    assert "Finished after 2 rollouts" in page and 'id="tokens"' in page and "‹" not in page
    assert sorted(file.name for file in (run / "validation").iterdir()) == ["000000.json", "000002.json"]
    assert main(["export", str(run), "--last", "--output", "student"]) == 0
    card = (tmp_path / "student" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "after 2 rollouts of the run `short/" in card
