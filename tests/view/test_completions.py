"""Which completions are shown, and that nothing in them reaches the terminal."""

from __future__ import annotations

from collections import Counter

from kdrl_pl.data.prompts import Prompt, PromptBatch
from kdrl_pl.experience import Experience
from kdrl_pl.view.completions import choose, one_line, shown


def test_best_and_worst_by_advantage_then_reward() -> None:
    assert choose(0, [0.0, 1.5, -1.5, 1.5], [0.0, 1.0, 0.0, 2.0])["best"] == 3
    assert choose(0, [0.0, 1.5, -1.5, -1.5], [0.0, 1.0, 0.5, 0.0])["worst"] == 3


def test_the_random_one_depends_on_the_rollout_alone_and_reaches_every_row() -> None:
    drawn = [choose(k, [0.0] * 8, [0.0] * 8)["random"] for k in range(400)]
    assert drawn == [choose(k, [9.0] * 8, [1.0] * 8)["random"] for k in range(400)]
    counts = Counter(drawn)
    assert sorted(counts) == list(range(8)) and max(counts.values()) < 90  # 50 each in expectation


def test_shown_takes_the_prompt_of_the_row() -> None:
    batch = PromptBatch(3, [Prompt("s/0", "1+1=", (5,)), Prompt("s/1", "2+2=", (6,))])
    batch.experience = Experience.from_rows(
        [(5,), (5,), (6,), (6,)],
        [(1,), (2,), (3,), (4,)],
        [0.0, 0.25, 1.0, 0.0],
        [0, 0, 1, 1],
        correct=[False, False, True, False],
        truncated=[False, False, False, True],
        uids=["s/0", "s/0", "s/1", "s/1"],
    )
    batch.completions = ["a", "b", "c", "d"]
    batch.reward_parts = {"format": [0.0, None, 1.0, 0.0]}
    batch.experience.advantages = batch.experience.rewards * 2 - 1
    best, worst, _ = shown(batch)
    assert (best.why, best.prompt, best.answer, best.reward, best.advantage) == ("best", "2+2=", "c", 1.0, 1.0)
    assert (best.verdict, best.parts) == ("right", {"format": 1.0})
    assert (worst.prompt, worst.verdict) == ("1+1=", "wrong")
    batch.experience.advantages = None  # pure distillation: the reward decides
    assert [one.advantage for one in shown(batch)] == [None, None, None]
    assert shown(batch)[0].answer == "c"


def test_one_line_is_safe_and_short() -> None:
    assert one_line("a\x1b[2Jb\r\nc\u202e", 80) == "a\\x1b[2Jb\\r ⏎ c\\u202e"
    long = one_line("x" * 500 + "y" * 500, 100)
    assert long == "x" * 50 + " … 900 more … " + "y" * 50
    assert one_line("  padded\t ", 80) == "padded"
