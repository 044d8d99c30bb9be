"""What holds for every procedural task."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kdrl_pl.data import tasks
from kdrl_pl.data.prompts import Prompt

SMALL = {"addition": {"digits": 2}, "countdown": {"compact": True}, "knights": {}, "word_problems": {}}
SMALL["reasoning_gym:chain_sum"] = {}


def prompt_of(row: dict) -> Prompt:
    columns = {key: value for key, value in row.items() if key not in ("prompt", "answer")}
    return Prompt("s/1", row["prompt"], (1,), row["answer"], "s", columns)


@pytest.mark.parametrize("name", SMALL)
def test_rows_are_distinct_reproducible_and_solved_by_their_own_answer(name):
    rows = tasks.make(name, 150, seed=4, **SMALL[name])
    assert len({row["prompt"] for row in rows}) == 150
    assert rows == tasks.make(name, 150, seed=4, **SMALL[name])
    assert rows[:20] == tasks.make(name, 20, seed=4, **SMALL[name])
    assert rows[0] != tasks.make(name, 1, seed=5, **SMALL[name])[0]
    for row in rows:
        assert row["task"] == name
        assert tasks.verify(prompt_of(row), row.get("response", row["answer"]))
        assert not tasks.verify(prompt_of(row), "")


@pytest.mark.parametrize("name", SMALL)
def test_splits_are_disjoint_whatever_the_seeds(name):
    prompts = {
        (split, seed): {row["prompt"] for row in tasks.make(name, 60, seed, split, **SMALL[name])}
        for split in ("train", "val", "test")
        for seed in (0, 1)
    }
    for (split, seed), mine in prompts.items():
        for (other_split, other_seed), other in prompts.items():
            if split != other_split:
                assert not mine & other, (split, seed, other_split, other_seed)
    everything = {row["prompt"] for row in tasks.make(name, 300, 0, "all", **SMALL[name])}
    assert everything & prompts["train", 0] and everything & prompts["val", 0]


def test_train_holds_eighty_of_a_hundred_problems():
    """One digit: 55 sums without their mirror images, all of them in exactly one split."""
    sizes = {}
    for split in ("train", "val", "test", "all"):
        with pytest.raises(ValueError, match="different problems of split") as error:
            tasks.make("addition", 1000, 0, split, digits=1)
        sizes[split] = int(str(error.value).split("only ")[1].split()[0])
    assert sizes["all"] == 100 == sizes["train"] + sizes["val"] + sizes["test"]
    assert 70 <= sizes["train"] <= 90


def test_a_split_does_not_depend_on_hash_seed_or_process():
    code = "from kdrl_pl.data import tasks; print([r['prompt'] for r in tasks.make('addition', 5, 0, 'val')])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert outputs == {f"{[row['prompt'] for row in tasks.make('addition', 5, 0, 'val')]}\n"}


def test_making_rows_imports_nothing_heavy():
    code = (
        "import sys; from kdrl_pl.data import tasks; tasks.make('countdown', 3)\n"
        "heavy = ('torch', 'transformers', 'datasets', 'reasoning_gym', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "[]\n"


def test_refusals():
    with pytest.raises(ValueError, match="unknown task 'subtraction'; expected one of addition, countdown"):
        tasks.make("subtraction", 1)
    with pytest.raises(ValueError, match="no split 'validation'; expected one of train, val, test, all"):
        tasks.make("addition", 1, 0, "validation")
    with pytest.raises(ValueError, match="no option 'digit'; it has digits, drop_carry, noise"):
        tasks.make("addition", 1, digit=3)
    with pytest.raises(ValueError, match="prompt rows/7 has no column 'task'"):
        tasks.verify(Prompt("rows/7", "t", (1,), "1"), "1")
