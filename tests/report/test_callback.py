"""What a real training leaves for its report."""

from __future__ import annotations

import json
import logging

import pytest
from tiny_run import fit, make_module

from kdrl_pl.report.callback import ReportWriter, ValidationSamples
from kdrl_pl.report.run import read_run


def train(folder, models, rollouts, resume=None):
    after = [ValidationSamples(), ReportWriter()]
    return fit(folder, make_module(*models), max_rollouts=rollouts, val_check_interval=2, after=after, resume=resume)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_models):
    """Four rollouts, validated before, after two and after four; the command line writes config.yaml."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("model: {student: tiny}\nrollout: {group_size: 4}\n")
    train(folder, tiny_models, 4)
    return folder


def test_the_first_and_the_newest_validation_are_kept(trained):
    assert sorted(path.name for path in (trained / "validation").iterdir()) == ["000000.json", "000004.json"]
    first, last = (json.loads((trained / f"validation/00000{n}.json").read_text()) for n in (0, 4))
    assert (first["rollouts"], last["rollouts"]) == (0, 4)
    assert [row["uid"] for row in first["rows"]] == [row["uid"] for row in last["rows"]] == ["val/1", "val/2", "val/3"]
    summary = json.loads((trained / "summary.json").read_text())
    assert first["results"] == summary["val"]["before"] and last["results"] == summary["val"]["after"]
    assert all(
        row["dataset"] == "val" and row["teacher_logprobs"] and row["kd_weights"] is None for row in last["rows"]
    )


def test_stored_rows_know_what_was_distilled(trained):
    rows = read_run(trained).rows(3)
    assert len(rows) == 16  # 4 prompts × 4
    tokens = sum(len(row["response_ids"]) for row in rows)
    assert rows[0]["token_weight"] == pytest.approx(1 / tokens, rel=1e-4)
    assert rows[0]["kd_weights"] == pytest.approx([1 / tokens] * len(rows[0]["response_ids"]), rel=1e-3)


def test_the_report_is_made_at_the_end_with_tokens_as_text(trained):
    page = (trained / "report.html").read_text()
    assert "Finished after 4 rollouts" in page and page.count("<svg") > 10
    assert "‹" not in page and "&lt;eos&gt;" in page


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path, tiny_models):
    train(tmp_path, tiny_models, 2)
    (checkpoint,) = (tmp_path / "checkpoints").glob("last-*.ckpt")
    before = (tmp_path / "validation" / "000000.json").read_text()
    (tmp_path / "validation" / "000009.json").write_text("{}")  # of rollouts that the checkpoint does not know
    train(tmp_path, tiny_models, 4, resume=checkpoint)
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["000000.json", "000004.json"]
    assert (tmp_path / "validation" / "000000.json").read_text() == before


def test_a_page_that_cannot_be_made_is_a_warning(tmp_path, tiny_models, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, tiny_models, 1)  # no config.yaml
    assert "no report.html: FileNotFoundError" in caplog.text
    assert (tmp_path / "summary.json").exists() and not (tmp_path / "report.html").exists()
