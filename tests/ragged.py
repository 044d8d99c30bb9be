"""Hypothesis strategies for ragged rollouts; the tests of properties import this module."""

from __future__ import annotations

from hypothesis import strategies as st

from kdrl_pl.experience import Experience

EOS = 1
REWARDS = st.sampled_from([-1.0, 0.0, 0.25, 1.0])


@st.composite
def ragged_rows(draw, min_group: int = 1) -> dict:
    """Arguments of `Experience.from_rows`: groups of several sizes with a common prompt each.

    A response may be empty, cut off by the budget, or end with `EOS`, which may stand inside a prompt as well.
    """
    rows: dict = {"prompts": [], "responses": [], "rewards": [], "group": [], "truncated": [], "correct": []}
    token = st.integers(0, 15)
    for group in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(token, min_size=1, max_size=5))
        for _ in range(draw(st.integers(min_group, 4))):
            response, ends = draw(st.lists(token, max_size=6)), draw(st.booleans())
            rows["prompts"].append(prompt)
            rows["responses"].append([*response, EOS] if ends else response)
            rows["rewards"].append(draw(REWARDS))
            rows["group"].append(group)
            rows["truncated"].append(not ends)
            rows["correct"].append(draw(st.booleans()))
    return rows


@st.composite
def experiences(draw, min_group: int = 2, **fields) -> Experience:
    """The same as an `Experience`; the budget is 7 tokens."""
    return Experience.from_rows(**draw(ragged_rows(min_group)), max_response_tokens=7, **fields)
