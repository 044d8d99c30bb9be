"""The doctor on the debug run as it is, and on what is wrong with it."""

from __future__ import annotations

import json
import shutil

import pytest

from kdrl_pl.__main__ import main
from kdrl_pl.data.prompts import Prompt
from kdrl_pl.doctor import machine as of_machine
from kdrl_pl.doctor.texts import reward
from kdrl_pl.rewards import ExactMatch, MathReward

STUDENT = "checkpoints/testbeds/arithmetic/student"


@pytest.fixture
def doctor(tmp_path, capsys):
    """Lines of `kdrl doctor` as (state, what, text); cures follow in a text of their own."""

    def run(*arguments: str, status: int = 0) -> dict[tuple[str, str], str]:
        assert main(["doctor", *arguments]) == status
        out = capsys.readouterr().out
        assert not (tmp_path / "runs").exists()
        found: dict[tuple[str, str], str] = {}
        for line in out.splitlines():
            if line.startswith(("ok ", "warn ", "fail ")):
                state, what = line[:4].strip(), line[6:16].strip()
                found[state, what] = found.get((state, what), "") + line[18:] + "\n"
            elif line.startswith(" "):
                found[state, what] += line.strip() + "\n"
        return found

    return run


@pytest.fixture
def debug(tmp_path):
    return ["--config", "configs/debug.yaml", "--run.root", str(tmp_path / "runs")]


def test_the_machine_alone(doctor) -> None:
    found = doctor()
    assert ("ok", "versions") in found and not [1 for state, _ in found if state == "fail"]
    assert {what for _, what in found} == {"versions", "devices", "threads", "disk"}


def test_a_sound_run(doctor, debug) -> None:
    found = doctor(*debug, "--prompts", "6")
    assert not [what for state, what in found if state == "fail"]
    assert found["ok", "prompt"] == "'864+394='\n"
    assert "1 '<eos>'; padding 0 '<pad>'" in found["ok", "end tokens"]
    assert "of the teacher: 1 '<eos>', the same as the student's" in found["ok", "end tokens"]
    assert "TaskReward judges 20 of 20 reference answers right" in found["ok", "reward"]
    assert found["ok", "rollout"].startswith("12 responses, ")
    assert "nats per token on average" in found["ok", "sampler"]
    assert "of 12 times, the student" in found["ok", "teacher"]


def test_answers_that_the_reward_cannot_read(doctor, debug, tmp_path) -> None:
    """As GSM8K's look without answer_pattern: the reward says which row and what to do."""
    rows = [{"prompt": f"{k}+{k}=", "answer": f"the sum\n#### {2 * k}"} for k in range(10, 18)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data.train", "null", "--data.train", f'{{"rows": {{"source": "{tmp_path}/rows.jsonl"}}}}']
    found = doctor(*debug, *data, "--rollout.reward", "kdrl_pl.rewards.NumericMatch", "--no-models", status=1)
    assert "row 'rows/1'" in found["fail", "run"] and "is not one number" in found["fail", "run"]


def test_a_bad_row_is_a_failure_with_its_cure(doctor, debug, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1="}\n')
    data = ["--data.train", "null", "--data.train", f'{{"rows": {{"source": "{tmp_path}/rows.jsonl"}}}}']
    found = doctor(*debug, *data, "--no-models", status=1)
    assert "no column 'prompt'" in found["fail", "run"] and "mend this first" in found["fail", "run"]


def test_an_end_of_turn_that_ends_nothing(doctor, debug, tmp_path) -> None:
    """A chat template that closes a turn with <pad>, while responses end with <eos>."""
    folder = tmp_path / "student"
    shutil.copytree(STUDENT, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<pad>{% endif %}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = doctor(*debug, "--model.student", str(folder), "--no-models", status=1)
    assert "ends an answer with 0 '<pad>'" in found["fail", "end tokens"]
    assert "rollout.sampling.stop_token_ids: [0]" in found["fail", "end tokens"]


def test_too_long_for_the_student(doctor, debug) -> None:
    found = doctor(*debug, "--rollout.sampling.max_tokens", "100000", "--no-models")
    assert "lower rollout.sampling.max_tokens" in found["warn", "length"]


def test_a_teacher_that_knows_less(doctor, debug) -> None:
    """The two change places: the one that forgets carries teaches."""
    swap = ["--model.student", "checkpoints/testbeds/arithmetic/teacher", "--model.teacher.path", STUDENT]
    found = doctor(*debug, *swap, "--prompts", "16")
    assert "competence_gate" in found["warn", "teacher"]


def test_a_full_disk_and_a_machine_with_other_work(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(of_machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1e9})())
    monkeypatch.setattr(of_machine.os, "getloadavg", lambda: (999.0, 0.0, 0.0))
    found = {finding.what: finding for finding in of_machine.machine(tmp_path / "not/there")}
    assert (found["disk"].state, found["threads"].state) == ("warn", "warn")
    assert "1.0 GB free" in found["disk"].text and "12 bytes per parameter" in found["disk"].cure


def prompts(*answers: str | None) -> list[Prompt]:
    return [Prompt(f"s/{k}", "?", (1,), answer) for k, answer in enumerate(answers)]


def test_reference_answers_in_the_form_the_reward_reads() -> None:
    (found,) = reward(ExactMatch(), prompts("12", "x y"), 100)
    assert found.state == "ok" and "2 of 2" in found.text
    maths = MathReward(workers=1)
    try:
        (found,) = reward(maths, prompts("\\frac{1}{2}", "7"), 100)
        assert found.state == "ok" and "boxed" in found.text
    finally:
        maths.close()


def test_a_reward_that_likes_silence_fails() -> None:
    def pleased(completions):
        from kdrl_pl.rewards.base import RewardOutput

        return RewardOutput([1.0] * len(completions), [True] * len(completions))

    states = [(finding.state, finding.text) for finding in reward(pleased, prompts(None), 10)]
    assert states == [("fail", "function judges an empty response right")]


def test_options(capsys) -> None:
    assert main(["doctor", "--prompts", "0"]) == 1
    assert "--prompts is 0; expected at least 1" in capsys.readouterr().err
