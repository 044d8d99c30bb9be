"""The files of a run folder: real files, torn lines, a real kill, and what a resume cuts back."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from kdrl_pl.data.prompts import Prompt
from kdrl_pl.environment import environment
from kdrl_pl.experience import Experience
from kdrl_pl.files import JSONLines, write_json_atomic
from kdrl_pl.records import RolloutFiles, rollout_rows
from kdrl_pl.summary import build_summary

ROOT = Path(__file__).resolve().parent.parent


def test_rows_come_back(tmp_path: Path) -> None:
    file = JSONLines(tmp_path / "new" / "metrics.jsonl", fsync=True)
    assert file.read() == []
    file.append({"rollout": 0, "train/loss": 0.5})
    file.append({"rollout": 1}, {"rollout": 2})
    assert file.path.read_bytes() == b'{"rollout":0,"train/loss":0.5}\n{"rollout":1}\n{"rollout":2}\n'
    assert file.read() == [{"rollout": 0, "train/loss": 0.5}, {"rollout": 1}, {"rollout": 2}]


def test_what_json_lacks(tmp_path: Path) -> None:
    file = JSONLines(tmp_path / "rows.jsonl")
    file.append({"a": math.nan, "b": [1.0, -math.inf, {"c": math.inf}], "d": "NaN", "e": True, "f": None})
    file.append({"tensor": torch.tensor([0.5, 1.5]), "scalar": torch.tensor(3), "path": Path("a/b"), "set": (1, 2)})
    file.append({"tensor": torch.tensor([0.5, math.nan])})
    assert file.read() == [
        {"a": None, "b": [1.0, None, {"c": None}], "d": "NaN", "e": True, "f": None},
        {"tensor": [0.5, 1.5], "scalar": 3, "path": "a/b", "set": [1, 2]},
        {"tensor": [0.5, None]},
    ]
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        file.append({"x": object()})
    assert len(file.read()) == 3


def test_no_text_can_break_a_row(tmp_path: Path) -> None:
    # newline, terminal escapes (7-bit and the one-byte C1 form), Unicode line separator, lone surrogate, NUL
    text = 'a\nb\r\x1b[31m\x9b31m\u2028\u0085\ud800"\\\x00 Ω 漢'
    file = JSONLines(tmp_path / "rows.jsonl")
    file.append({"text": text})
    assert file.read() == [{"text": text}]
    raw = file.path.read_bytes()
    assert raw.count(b"\n") == 1 and all(32 <= byte < 127 for byte in raw[:-1])


@pytest.mark.parametrize("torn", ['{"rollout":2,"x":1', '{"rollout":2}', "\0\0\0", "x" * 200_000])
def test_torn_last_line_is_not_read_and_not_glued_to_the_next(tmp_path: Path, torn: str) -> None:
    file = JSONLines(tmp_path / "rows.jsonl")
    whole = [{"rollout": 0}, {"rollout": 1}]
    file.append(*whole)
    with open(file.path, "a") as raw:
        raw.write(torn)
    assert file.read() == whole
    file.append({"rollout": 3})
    assert file.read() == [*whole, {"rollout": 3}]


def test_file_of_one_torn_line_starts_over(tmp_path: Path) -> None:
    file = JSONLines(tmp_path / "rows.jsonl")
    file.path.write_text('{"rollo')
    file.append({"rollout": 0})
    assert file.read() == [{"rollout": 0}]


@pytest.mark.parametrize("bad", ["{oops}", "[1]", ""])
def test_damage_in_the_middle_names_file_and_line(tmp_path: Path, bad: str) -> None:
    file = JSONLines(tmp_path / "rows.jsonl")
    file.path.write_text(f'{{"rollout":0}}\n{bad}\n{{"rollout":1}}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: .* is not a JSON object"):
        file.read()


def test_truncate_after_cuts_back_to_a_checkpoint(tmp_path: Path) -> None:
    file = JSONLines(tmp_path / "rows.jsonl")
    assert file.truncate_after("rollout", 0) == 0  # no file, no error, none made
    assert not file.path.exists()
    file.append({"note": "no rollout"}, *({"rollout": k, "x": k / 2} for k in range(5)), {"rollout": 1, "late": True})
    with open(file.path, "a") as raw:
        raw.write('{"rollout":')
    assert file.truncate_after("rollout", 3) == 2
    assert file.path.read_bytes().endswith(b'{"rollout":1,"late":true}\n')
    assert [row.get("rollout") for row in file.read()] == [None, 0, 1, 2, 1]
    unchanged = file.path.stat().st_ino
    assert file.truncate_after("rollout", 3) == 0
    assert file.path.stat().st_ino == unchanged  # nothing to drop, nothing rewritten
    assert os.listdir(tmp_path) == ["rows.jsonl"]


WRITER = """
import itertools, sys
from kdrl_pl.files import JSONLines, write_json_atomic
folder = sys.argv[1]
rows = JSONLines(folder + "/rows.jsonl")
for i in itertools.count():
    rows.append({"rollout": i, "text": "x" * 100_000})
    write_json_atomic(folder + "/state.json", {"i": i, "text": "y" * 100_000})
"""


@pytest.mark.faults
def test_kill_loses_at_most_the_last_row(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=environ)
    rows, state = JSONLines(tmp_path / "rows.jsonl"), tmp_path / "state.json"
    deadline = time.monotonic() + 60
    try:
        while len(rows.read()) < 20:  # a reader may look at any time
            assert process.poll() is None and time.monotonic() < deadline
            if state.exists():
                json.loads(state.read_text())
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = [row["rollout"] for row in rows.read()]
    assert found == list(range(len(found)))
    assert len(found) - json.loads(state.read_text())["i"] in (1, 2)
    rows.append({"rollout": "next"})
    assert rows.read()[-1] == {"rollout": "next"} and len(rows.read()) == len(found) + 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rollout_files_keep_the_newest(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path, keep=2)
    for rollout in (8, 9, 10, 1_000_000):
        files.write(rollout, [{"rollout": rollout}])
    assert names(tmp_path) == ["000010.jsonl", "1000000.jsonl"]  # by number, not by name
    (tmp_path / "notes.jsonl").write_text("mine")
    files.write(11, [{"rollout": 11}])
    assert "notes.jsonl" in names(tmp_path)


def test_rollout_files_none_and_all(tmp_path: Path) -> None:
    RolloutFiles(tmp_path / "none", keep=0).write(0, [{"rollout": 0}])
    assert not (tmp_path / "none").exists()
    everything = RolloutFiles(tmp_path / "all", keep=-1)
    for rollout in range(4):
        everything.write(rollout, [{"rollout": rollout}])
    assert len(names(tmp_path / "all")) == 4
    with pytest.raises(ValueError, match="keep=-2; expected"):
        RolloutFiles(tmp_path, keep=-2)


def test_rollout_files_repeat_and_cut_back(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    for rollout in range(3):
        files.write(rollout, [{"rollout": rollout, "try": 1}])
    files.write(1, [{"rollout": 1, "try": 2}])
    assert JSONLines(files.path(1)).read() == [{"rollout": 1, "try": 2}]
    files.truncate_after(1)
    assert names(tmp_path) == ["000000.jsonl"]
    RolloutFiles(tmp_path / "missing").truncate_after(0)


def test_rollout_files_of_several_ranks(tmp_path: Path) -> None:
    ranks = [RolloutFiles(tmp_path, keep=2, rank=r, world_size=3) for r in range(3)]
    for rollout in range(3):
        for rank in ranks:
            rank.write(rollout, [{"rollout": rollout}])
    both = ["000001-rank1.jsonl", "000001-rank2.jsonl", "000001.jsonl"]
    assert names(tmp_path) == both + [name.replace("1", "2", 1) for name in both]
    ranks[1].truncate_after(2)  # a rank touches its own files only
    assert names(tmp_path) == [*both, "000002-rank2.jsonl", "000002.jsonl"]
    RolloutFiles(tmp_path, keep=2).truncate_after(1)  # resumed on one process: nothing of the others stays
    assert names(tmp_path) == []


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path)
    files.write(0, [{"rollout": 0}])
    with pytest.raises(TypeError):
        files.write(0, [{"rollout": 0}, {"rollout": object()}])
    assert JSONLines(files.path(0)).read() == [{"rollout": 0}]
    assert names(tmp_path) == ["000000.jsonl"]


PROMPTS = [Prompt("set/0", "1+1=", (5, 6)), Prompt("set/1", "12+3=", (5, 5, 7))]


def experience() -> Experience:
    rows = Experience.from_rows(
        prompts=[(5, 6), (5, 6), (5, 5, 7), (5, 5, 7)],
        responses=[(9, 2), (8,), (9, 8, 2), (0, 0)],  # 0 is the padding id too
        rewards=[1.0, 0.0, 1 / 3, math.nan],
        group=[0, 0, 1, 1],
        behavior_logprobs=[(-0.123456789, -1e-9), (-12.3456789,), (-1, -2, -3), (0, -math.inf)],
        correct=[True, False, False, False],
        truncated=[False, True, False, False],
        uids=["set/0", "set/0", "set/1", "set/1"],
    )
    rows.advantages = torch.tensor([0.70710678, -0.70710678, 0.0, 0.0])
    return rows


def test_rollout_rows(tmp_path: Path) -> None:
    parts = {"format": [1.0, None, 0.0, 0.0]}
    files = RolloutFiles(tmp_path)
    files.write(7, rollout_rows(7, experience(), PROMPTS, ["2", "x", "15", "??"], parts))
    rows = JSONLines(files.path(7)).read()
    assert rows[0] == {
        "rollout": 7,
        "uid": "set/0",
        "group": 0,
        "prompt": "1+1=",
        "completion": "2",
        "reward": 1.0,
        "parts": {"format": 1.0},
        "correct": True,
        "truncated": False,
        "advantage": 0.707107,
        "prompt_ids": [5, 6],
        "response_ids": [9, 2],
        "behavior_logprobs": [-0.123457, -1e-09],
        "old_logprobs": None,
        "teacher_logprobs": None,
        "token_weight": None,
        "kd_weights": None,
    }
    assert rows[1]["behavior_logprobs"] == [-12.3457] and rows[1]["parts"] == {"format": None} and rows[1]["truncated"]
    assert (rows[2]["prompt"], rows[2]["reward"]) == ("12+3=", 0.333333)
    assert rows[3]["response_ids"] == [0, 0] and rows[3]["behavior_logprobs"] == [0.0, None]
    assert rows[3]["reward"] is None


def test_rows_that_were_trained_on_say_with_what_weight() -> None:
    rows = experience()
    rows.token_weights = torch.tensor([0.25, 0.25, 1 / 3, 0.0])
    rows.kd_weights = torch.where(rows.response_mask, torch.tensor([[2.0], [0.0], [1 / 3], [1.0]]), 0.0)
    first, masked, third, dropped = rollout_rows(0, rows, PROMPTS, [""] * 4)
    assert (first["token_weight"], first["kd_weights"]) == (0.25, [2.0, 2.0])
    assert masked["kd_weights"] == [0.0] and dropped["token_weight"] == 0.0
    assert (third["token_weight"], set(third["kd_weights"])) == (0.333333, {0.3333})


def test_rollout_rows_go_back_into_an_experience() -> None:
    rows = list(rollout_rows(0, experience(), PROMPTS, ["", "", "", ""]))
    again = Experience.from_rows(
        [row["prompt_ids"] for row in rows],
        [row["response_ids"] for row in rows],
        [row["reward"] for row in rows],
        [row["group"] for row in rows],
        behavior_logprobs=[row["behavior_logprobs"] for row in rows],
    )
    for name in ("input_ids", "attention_mask", "response_mask", "group"):
        assert torch.equal(getattr(again, name), getattr(experience(), name)), name
    torch.testing.assert_close(again.behavior_logprobs, experience().behavior_logprobs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("completions", "parts", "prompts", "message"),
    [
        (["a"], None, PROMPTS, r"completions has 1 entries; expected one per row of the experience \(4\)"),
        (["a"] * 4, {"format": [1.0]}, PROMPTS, "format has 1 entries"),
        (["a"] * 4, None, PROMPTS[:1], "rows of 'set/1', which is not among the 1 prompts"),
    ],
)
def test_rollout_rows_refuse_what_does_not_fit(completions, parts, prompts, message) -> None:
    with pytest.raises(ValueError, match=message):
        list(rollout_rows(0, experience(), prompts, completions, parts))


def test_summary(tmp_path: Path) -> None:
    before, after = {"add": {"avg_at_k": 0.25, "pass_at_4": 0.5}}, {"add": {"avg_at_k": 0.75, "pass_at_4": math.nan}}
    write_json_atomic(tmp_path / "summary.json", build_summary(before, after, seconds=1.5, tokens=300, rollouts=2))
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "val": {
            "before": {"add": {"avg_at_k": 0.25, "pass_at_4": 0.5}},
            "after": {"add": {"avg_at_k": 0.75, "pass_at_4": None}},
        },
        "seconds": 1.5,
        "tokens": 300,
        "rollouts": 2,
    }
    assert build_summary(None, after, seconds=0, tokens=0)["val"]["before"] is None


def test_write_json_atomic_leaves_the_old_file_on_error(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.json"
    write_json_atomic(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and names(path.parent) == ["state.json"]


def test_environment(tmp_path: Path) -> None:
    found = environment(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["lightning"] and found["packages"]["transformers"]
    assert found["python"] == sys.version.split()[0]
    assert found["cpu"]["name"] and found["cpu"]["count"] == os.cpu_count()
    assert len(found["devices"]) == torch.cuda.device_count()
    assert found["git"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_environment_names_the_commit(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    (tmp_path / "a.txt").write_text("1")
    for command in (["init", "-q"], ["add", "a.txt"], ["commit", "-q", "--no-verify", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "log", "--format=%H"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "untracked.txt").write_text("1")
    assert environment(tmp_path)["git"] == {"commit": commit, "changed": False}
    (tmp_path / "a.txt").write_text("2")
    assert environment(tmp_path)["git"] == {"commit": commit, "changed": True}
