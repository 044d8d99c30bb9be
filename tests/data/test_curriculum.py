"""The curriculum: weights by hand, draws in proportion to them, a memory heard in time, and nobody starves."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kdrl_pl.data.curriculum import Curriculum, CurriculumSampler
from kdrl_pl.data.loaders import RolloutLoader
from kdrl_pl.data.prompts import Prompt
from kdrl_pl.errors import RunError
from kdrl_pl.experience import Experience


def sampler(sizes: dict[str, int], count: int, weights=None, seed: int = 0, **settings) -> CurriculumSampler:
    uids = {name: [f"{name}/{row}" for row in range(size)] for name, size in sizes.items()}
    return CurriculumSampler(Curriculum(**settings), uids, weights, count, seed)


def loader(sampler: CurriculumSampler) -> RolloutLoader:
    prompts = {name: [Prompt(uid, "q", (1,), "a", name) for uid in uids] for name, uids in sampler.uids.items()}
    return RolloutLoader(prompts, sampler, lambda: (0, None))


def answer(batch, correct: list[list[bool]]) -> None:
    """Fill in a rollout: one list of verdicts per prompt."""
    group = [i for i, verdicts in enumerate(correct) for _ in verdicts]
    rows = sum(correct, [])  # noqa: RUF017
    batch.experience = Experience.from_rows(
        [[1]] * len(rows), [[2]] * len(rows), [0.0] * len(rows), group, correct=rows
    )


def test_weights_by_hand() -> None:
    # 0.05 + 0.95 * 4 p (1 - p); target 1/4: sqrt(4 p) * (4/3 (1 - p))^1.5, at p = 1/2 that is sqrt(2) * (2/3)^1.5.
    rates = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    assert Curriculum().weights(rates).tolist() == pytest.approx([0.05, 0.7625, 1.0, 0.7625, 0.05])
    quarter = Curriculum(target=0.25, floor=0.2).weights(rates)
    assert quarter.tolist() == pytest.approx([0.2, 1.0, 0.2 + 0.8 * 0.769800359, 0.2 + 0.8 / 3, 0.2])


def test_draws_are_in_proportion_to_the_weights_and_nobody_starves() -> None:
    # One draw per rollout: the chance of a row is its weight over their sum, 0.05 : 0.7625 : 1 : 0.05.
    # Red: weights turned round, uniforms shared by rollouts or rows, a row of rate 0 or 1 never drawn.
    s = sampler({"a": 4}, 1)
    s.load_state_dict({"a/0": 0.0, "a/1": 0.25, "a/2": 0.5, "a/3": 1.0})
    rollouts = 4000
    drawn = Counter(row for k in range(rollouts) for _, row in s.rollout(k))
    for row, weight in enumerate((0.05, 0.7625, 1.0, 0.05)):
        chance = weight / 1.8625
        assert drawn[row] == pytest.approx(rollouts * chance, abs=4 * (rollouts * chance * (1 - chance)) ** 0.5)


def test_a_rollout_has_no_prompt_twice_before_it_has_them_all() -> None:
    s = sampler({"a": 5}, 3)
    for k in range(20):
        assert len(set(s.rollout(k))) == 3
    few = sampler({"a": 2, "b": 8}, 10, {"a": 1.0, "b": 1.0})  # five draws of two rows
    drawn = Counter(few.rollout(0))
    assert sorted(drawn[("a", row)] for row in range(2)) == [2, 3]
    assert all(drawn[("b", row)] <= 1 for row in range(8))


def test_sets_keep_their_shares_whatever_their_rates() -> None:
    s = sampler({"easy": 30, "hard": 30}, 12, {"easy": 1.0, "hard": 3.0})
    s.load_state_dict({f"hard/{row}": 0.0 for row in range(30)})
    assert [Counter(name for name, _ in s.rollout(k)) for k in range(5)] == [{"easy": 3, "hard": 9}] * 5


def test_the_draws_are_a_function_of_seed_rollout_and_memory() -> None:
    one, same, other = sampler({"a": 50}, 8), sampler({"a": 50}, 8), sampler({"a": 50}, 8, seed=1)
    assert [one.rollout(k) for k in (3, 0, 3)] == [same.rollout(k) for k in (3, 0, 3)]
    assert one.rollout(0) != one.rollout(1) != other.rollout(1)
    same.load_state_dict({f"a/{row}": 1.0 for row in range(40)})
    drawn = [row for k in range(5) for _, row in same.rollout(k)]
    assert sum(row >= 40 for row in drawn) > len(drawn) / 2  # unseen prompts stand at the prior
    # Resumed runs rely on it: a change here is a change of every run's data order.
    assert [row for _, row in sampler({"a": 8}, 4).rollout(0)] == [6, 2, 3, 5]


def test_pass_rates_are_moving_averages_heard_before_the_next_batch() -> None:
    # Two visits by hand: 0.5 + 0.5 (1 - 0.5) = 0.75, then 0.75 + 0.5 (0.25 - 0.75) = 0.5.
    # Red: rows assigned to other prompts, the mean over the batch, a rollout heard twice or one too late.
    s = sampler({"a": 2}, 2)
    batches = loader(s)
    first = batches.batch(0)
    assert first.metrics == {"data/prompts_seen": (0, 1), "data/pass_rate_mean": (0.0, 0)}
    shares = {"a/0": [True] * 4, "a/1": [False] * 4}
    answer(first, [shares[p.uid] for p in first.prompts])
    assert s.state_dict(0) == {}  # a checkpoint in the middle of rollout 0
    second = batches.batch(1)
    assert s.state_dict(1) == s.state_dict(1) == {"a/0": 0.75, "a/1": 0.25}
    assert second.metrics == {"data/prompts_seen": (2, 1), "data/pass_rate_mean": (1.0, 2)}
    shares = {"a/0": [False, False, True, False], "a/1": [True] * 4}
    answer(second, [shares[p.uid] for p in second.prompts])
    assert s.state_dict(2) == {"a/0": 0.5, "a/1": 0.625}  # a checkpoint right after rollout 1


def test_a_prompt_drawn_twice_is_heard_twice() -> None:
    s = sampler({"a": 1, "b": 1}, 2, {"a": 1e6, "b": 1.0})
    batches = loader(s)
    batch = batches.batch(0)
    assert [p.uid for p in batch.prompts] == ["a/0", "a/0"]
    answer(batch, [[True, True], [False, True]])
    assert s.state_dict(1) == {"a/0": 0.625}  # 0.75, then half-way to 0.5


def test_a_batch_that_is_fetched_too_early_is_refused() -> None:
    batches = loader(sampler({"a": 4}, 2))
    batches.batch(0)
    with pytest.raises(RunError, match=r"prompts of rollout 1 were fetched before rollout 0 was sampled.*prefetch"):
        batches.batch(1)


def test_refusals_name_the_range() -> None:
    for name, value in (("target", 0.0), ("target", 1.0), ("floor", 0.0), ("prior", -0.1), ("smoothing", 0.0)):
        with pytest.raises(ValueError, match=rf"data.curriculum.{name} is {value}; expected "):
            Curriculum(**{name: value})
