"""What a run stored comes back as the rows that it trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdrl_pl.data.prompts import Prompt
from kdrl_pl.experience import Experience
from kdrl_pl.records import NonFiniteRollouts, RolloutFiles, rollout_rows
from kdrl_pl.replay.stored import load_rollout, stored_rollouts


def experience_of(rank: int = 0) -> Experience:
    return Experience.from_rows(
        [[1, 2], [1, 2], [3], [3]],
        [[4], [5, 6], [7, 8, 9], [4 + rank]],
        [0.0, 1.0, 0.5, 0.0],
        [0, 0, 1, 1],
        behavior_logprobs=[[-1.0], [-0.5, -0.25], [-1.5, -2.0, -0.125], [-3.0]],
        correct=[False, True, False, False],
        truncated=[False, False, True, False],
        uids=[f"a/{rank}", f"a/{rank}", "b/1", "b/1"],
    )


def write(folder: Path, number: int, rank: int = 0, world_size: int = 1) -> None:
    rows = experience_of(rank)
    prompts = [Prompt(uid, "text", (1,)) for uid in dict.fromkeys(rows.uids)]
    RolloutFiles(folder / "rollouts", -1, rank, world_size).write(number, rollout_rows(number, rows, prompts, [""] * 4))


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    write(tmp_path, 7)
    ((name, files),) = stored_rollouts([tmp_path]).items()
    number, rows = load_rollout(files, temperature=0.7, max_response_tokens=9)
    assert (name, number) == (str(tmp_path / "rollouts/000007.jsonl"), 7)
    expected = experience_of()
    for field in ("input_ids", "response_mask", "rewards", "group", "correct", "truncated", "behavior_logprobs"):
        assert torch.equal(getattr(rows, field), getattr(expected, field)), field
    assert (rows.uids, rows.temperature, rows.max_response_tokens) == (expected.uids, 0.7, 9)


def test_files_of_two_ranks_are_one_rollout(tmp_path: Path) -> None:
    # Red: groups of one rank taken for those of another, which count from 0 too.
    for number in (3, 12):
        for rank in range(2):
            write(tmp_path, number, rank, 2)
    stored = stored_rollouts([tmp_path])
    assert [Path(name).name for name in stored] == ["000003.jsonl", "000012.jsonl"]
    for files in stored.values():
        _, rows = load_rollout(files)
        assert rows.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert rows.uids[::2] == ["a/0", "b/1", "a/1", "b/1"]


def test_a_file_of_tensors_stands_for_itself(tmp_path: Path) -> None:
    for rank in range(2):
        NonFiniteRollouts(tmp_path, rank).write(41, experience_of(rank))
    stored = stored_rollouts(sorted(tmp_path.iterdir()))
    assert [Path(name).name for name in stored] == ["rollout-000041-rank1.pt", "rollout-000041.pt"]
    assert [load_rollout(files)[0] for files in stored.values()] == [41, 41]


def test_what_is_no_rollout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no stored rollouts at .*; give a run folder that has rollouts/"):
        stored_rollouts([tmp_path])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"metrics.jsonl is no stored rollout; expected a name like 000123.jsonl"):
        stored_rollouts([tmp_path / "metrics.jsonl"])
