"""Samplers: every prompt once per pass, exact shares, and a rollout that only seed and number decide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_pl.data.curriculum import Curriculum, CurriculumSampler
from kdrl_pl.data.sampler import PromptSampler, occurrences, permutation

SEED = st.integers(0, 5)


@st.composite
def mixtures(draw) -> dict:
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
    sizes = {name: draw(st.integers(1, 9)) for name in names}
    weights = {name: draw(st.sampled_from([0.5, 1.0, 2.0, 3.0])) for name in names}
    return {
        "sizes": sizes,
        "weights": weights,
        "prompts_per_rollout": draw(st.integers(1, sum(sizes.values()))),
        "seed": draw(SEED),
    }


@given(mixtures(), st.integers(1, 8))
def test_every_prompt_comes_once_per_pass(mixture, rollouts):
    sampler = PromptSampler(**mixture)
    drawn = [pick for k in range(rollouts) for pick in sampler.rollout(k)]
    for name, size in mixture["sizes"].items():
        rows = [row for of_set, row in drawn if of_set == name]
        for start in range(0, len(rows), size):
            lap = rows[start : start + size]
            assert len(set(lap)) == len(lap) and set(lap) <= set(range(size))


@given(mixtures(), st.integers(1, 8))
def test_shares_are_exact_to_one_draw_at_any_time(mixture, rollouts):
    sampler = PromptSampler(**mixture)
    weights = mixture["weights"]
    drawn = [name for k in range(rollouts) for name, _ in sampler.rollout(k)]
    for number in range(1, len(drawn) + 1):
        for name, weight in weights.items():
            due = number * weight / sum(weights.values())
            assert abs(drawn[:number].count(name) - due) <= 1.0 + 1e-9


@given(mixtures(), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_rollout_depends_on_seed_and_number_alone(mixture, numbers):
    used = PromptSampler(**mixture)
    for k in numbers:
        assert used.rollout(k) == PromptSampler(**mixture).rollout(k)


@given(mixtures(), st.integers(0, 20), st.integers(1, 4))
def test_ranks_together_have_the_rollout(mixture, k, ranks):
    if mixture["prompts_per_rollout"] % ranks:
        with pytest.raises(ValueError, match="not divisible"):
            PromptSampler(**mixture, world_size=ranks)
        return
    whole = PromptSampler(**mixture, world_size=ranks).rollout(k)
    assert whole == PromptSampler(**mixture).rollout(k)


@given(SEED, st.integers(0, 9), st.sampled_from(["a", "b/c", ""]), st.integers(0, 30))
def test_a_permutation_has_every_number_once_and_is_the_same_again(seed, lap, name, size):
    order = permutation(seed, lap, name, size)
    assert sorted(order) == list(range(size)) and order == permutation(seed, lap, name, size)
    assert size < 20 or order != permutation(seed + 1, lap, name, size)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3)), max_size=12))
def test_occurrences_count_what_came_before(items):
    assert occurrences(items) == [items[:i].count(item) for i, item in enumerate(items)]


@given(mixtures(), st.data())
def test_a_curriculum_is_a_function_of_seed_number_and_what_it_remembers(mixture, data):
    sizes = mixture.pop("sizes")
    uids = {name: [f"{name}/{row}" for row in range(size)] for name, size in sizes.items()}
    known = {uid: data.draw(st.floats(0, 1)) for of_set in uids.values() for uid in of_set if data.draw(st.booleans())}
    k = data.draw(st.integers(0, 20))
    plain = PromptSampler(sizes, **mixture).rollout(k)
    samplers = [CurriculumSampler(Curriculum(), uids, **mixture) for _ in range(2)]
    samplers[0].load_state_dict(known)
    samplers[1].load_state_dict(samplers[0].state_dict(0))
    samplers[1].rollout(k + 1)  # asked in another order
    drawn = samplers[0].rollout(k)
    assert drawn == samplers[1].rollout(k)
    assert [name for name, _ in drawn] == [name for name, _ in plain]  # the sets keep their shares
    for name, size in sizes.items():
        rows = [row for of_set, row in drawn if of_set == name]
        assert all(0 <= row < size for row in rows)
        assert len(set(rows)) == min(len(rows), size)  # without replacement


@given(st.floats(0.05, 0.95), st.floats(0.01, 1.0), st.floats(0, 1))
def test_no_pass_rate_weighs_more_than_the_target_or_less_than_the_floor(target, floor, rate):
    import numpy as np

    curriculum = Curriculum(target, floor)
    weight, best = curriculum.weights(np.array([rate, target]))
    assert floor * (1 - 1e-9) <= weight <= best * (1 + 1e-9)
    assert best == pytest.approx(1.0)
    share = curriculum.updated(rate, 1.0)
    assert rate <= share <= 1.0
