"""The last lines of a run, from the files that it leaves."""

from __future__ import annotations

import json

from kdrl_pl.view.closing import closing, learned


def test_closing(tmp_path) -> None:
    before = {"add": {"avg_at_k": 0.139, "length": 24.0, "truncated": 0.0, "kl_teacher": 0.582}}
    after = {"add": {"avg_at_k": 0.786, "length": 24.0, "truncated": 0.0, "kl_teacher": 0.05}}
    summary = {"val": {"before": before, "after": after}, "seconds": 3725.0, "tokens": 1234567, "rollouts": 120}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.json").write_text('{"file": "best-000100.ckpt", "val/avg_at_k": 0.79}')
    rows = [{"rollout": 9, "code": "K003"}, {"rollout": 12, "code": "K001"}, {"rollout": 40, "code": "K003"}]
    (tmp_path / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "report.html").touch()
    assert closing(tmp_path).splitlines() == [
        "120 rollouts in 1 h 2 min, 1,234,567 tokens sampled",
        "",
        "add  accuracy       13.9% → 78.6%  (+64.7 points)",
        "     length         24 → 24  (+0 tokens)",
        "     KL to teacher  0.582 → 0.050  (-0.532 nats)",
        "",
        "alarms:     K003, K001 (alarms.jsonl; docs/troubleshooting.md says what to do)",
        f"run folder: {tmp_path}",
        f"best:       {tmp_path}/checkpoints/best-000100.ckpt",
        f"report:     {tmp_path}/report.html",
        f"next:       kdrl export {tmp_path}",
    ]


def test_without_a_validation_before() -> None:
    assert learned(None, {"a": {"avg_at_k": 0.5}, "b": {"avg_at_k": 0.25, "truncated": 0.1}}) == [
        "a  accuracy  50.0%",
        "b  accuracy  25.0%",
        "   cut off   10.0%",
    ]
    assert learned(None, {}) == []


def test_a_difference_that_rounds_to_nothing_has_no_minus() -> None:
    before, after = {"a": {"kl_teacher": 0.5004, "length": 24.2}}, {"a": {"kl_teacher": 0.5001, "length": 24.0}}
    assert learned(before, after) == [
        "a  length         24 → 24  (+0 tokens)",
        "   KL to teacher  0.500 → 0.500  (+0.000 nats)",
    ]
