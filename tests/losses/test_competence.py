"""The competence gate: what a file of the teacher's results says, and the weights it leaves, against float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdrl_pl.data.prompts import Prompt
from kdrl_pl.experience import Experience
from kdrl_pl.losses.competence import Competence
from kdrl_pl.losses.distillation import Distillation
from kdrl_pl.losses.weights import experience_weights


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def results(tmp_path: Path) -> str:
    """a/0: 3 of 4 right; a/1: 1 of 4; b/0: a share of exactly one half, from elsewhere."""
    verdicts = [("a/0", True), ("a/1", False), ("a/0", True), ("a/1", False), ("a/0", False), ("a/1", True)]
    rows = [{"uid": uid, "prompt": f"text of {uid}", "correct": c} for uid, c in verdicts]
    rows += [{"uid": "a/0", "prompt": "text of a/0", "correct": True}, {"uid": "a/1", "correct": False}]
    return write(tmp_path / "teacher.jsonl", [*rows, {"uid": "b/0", "correct": 0.5}])


def test_a_prompt_is_taught_from_the_given_share_on(results: str) -> None:
    # Red: one right response is enough, more than the share is asked for, rows counted instead of responses.
    assert Competence(results).rates == {"a/0": 0.75, "a/1": 0.25, "b/0": 0.5}
    uids = ["b/0", "a/1", "a/0", "a/0"]
    for at_least, expected in ((0.2, [1, 1, 1, 1]), (0.5, [1, 0, 1, 1]), (0.51, [0, 0, 1, 1]), (1.0, [0, 0, 0, 0])):
        gate = Competence(results, at_least)(uids)
        assert gate.dtype == torch.bool
        assert gate.int().tolist() == expected


LENGTHS = [2, 3, 1, 4, 2, 2]
GROUP = [0, 0, 1, 1, 2, 2]
UIDS = ["a/0", "a/0", "a/1", "a/1", "b/0", "b/0"]
ADVANTAGES = [1.0, -1.0, -0.5, 0.5, -2.0, -0.1]


@pytest.mark.parametrize("normaliser", ["group", "token", "sequence", "constant"])
@pytest.mark.parametrize("kd_normaliser", ["all", "kept"])
@pytest.mark.parametrize("mask", ["none", "negative_advantage"])
def test_the_weights_are_those_of_the_rows_that_pass_mask_and_gate(
    normaliser: str, kd_normaliser: str, mask: str, results: str
) -> None:
    # Red: the gate left out of the counts of "kept", or counted in those of "all"; rl weights changed by it.
    experience = Experience.from_rows(
        [[1]] * 6, [[2] * n for n in LENGTHS], [0.0] * 6, GROUP, uids=UIDS, max_response_tokens=5
    )
    experience.advantages = torch.tensor(ADVANTAGES)
    term = Distillation(mask=mask, normaliser=kd_normaliser, competence=Competence(results))
    experience_weights(experience, [torch.arange(6)], normaliser, term, lambda totals: totals)
    passes = [uid != "a/1" and (mask == "none" or a < 0) for uid, a in zip(UIDS, ADVANTAGES, strict=True)]

    def weight(row: int, counted: list[bool]) -> float:
        """1 / (P N_g), 1 / N, 1 / (B |o|), 1 / (B L) over the counted rows."""
        lengths = [n if c else 0 for n, c in zip(LENGTHS, counted, strict=True)]
        groups = {g for g, n in zip(GROUP, lengths, strict=True) if n}
        of_group = sum(n for g, n in zip(GROUP, lengths, strict=True) if g == GROUP[row])
        rows = sum(counted)
        return {
            "group": 1 / (len(groups) * max(of_group, 1)),
            "token": 1 / sum(lengths),
            "sequence": 1 / (rows * LENGTHS[row]),
            "constant": 1 / (rows * 5),
        }[normaliser]

    counted = passes if kd_normaliser == "kept" else [True] * 6
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        if passes[row]:
            expected[row, 1 : 1 + length] = weight(row, counted)
    assert torch.allclose(experience.kd_weights.double(), expected, rtol=1e-6, atol=0)
    assert experience.token_weights.tolist() == pytest.approx([weight(row, [True] * 6) for row in range(6)])
    assert not term.asks_about_all  # else the teacher would be asked about rows it may not teach


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(f"a/{row}", text, (1,)) for row, text in enumerate(texts)]


def test_training_prompts_are_compared_with_the_file(results: str) -> None:
    gate = Competence(results)
    gate.check(prompts("text of a/0", "a text that the file does not name"))  # the last row of a/1 names none
    with pytest.raises(
        ValueError, match=r"2 of 4 training prompts are not in .*teacher.jsonl, which has 3 \(the first"
    ):
        gate.check(prompts("text of a/0", "", "x", "y"))
    with pytest.raises(
        ValueError, match=r"another prompt under the name 'a/0' than the training prompt '1\+1='.*kdrl p"
    ):
        gate.check(prompts("1+1="))
    with pytest.raises(
        ValueError, match=r"1 of 2 training prompts are not in .*'c/0'.*--rollout.policy teacher --output"
    ):
        gate(["a/0", "c/0", "c/0"])


def test_bad_files_and_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file 'none.jsonl' with the teacher's responses; .*kdrl predict"):
        _ = Competence("none.jsonl").rates
    for row in ({"uid": "a/0"}, {"uid": 3, "correct": True}, {"uid": "a/0", "correct": 2.0}, [1]):
        path = write(tmp_path / "bad.jsonl", [{"uid": "a/0", "correct": True}, row])
        with pytest.raises(ValueError, match=r"bad.jsonl, line 2: .* is no row with uid and correct"):
            _ = Competence(path).rates
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"at_least is {share}; expected a share"):
            Competence("x", share)
