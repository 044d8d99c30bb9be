"""reasoning-gym's tasks with their own scorers, and the guard around those."""

from __future__ import annotations

import pytest

from kdrl_pl.data import tasks
from kdrl_pl.data.prompts import Prompt
from kdrl_pl.data.tasks import reasoning_gym


def prompts(name: str, count: int, **options) -> list[Prompt]:
    rows = tasks.make(f"reasoning_gym:{name}", count, seed=3, **options)
    return [
        Prompt(f"s/{i}", row["prompt"], (1,), row["answer"], "s", {k: v for k, v in row.items() if k != "prompt"})
        for i, row in enumerate(rows, 1)
    ]


def test_options_reach_the_task_and_answers_are_found_in_box_and_tag():
    for prompt in prompts("chain_sum", 20, min_terms=2, max_terms=2, min_digits=1, max_digits=1):
        assert prompt.text.count("+") + prompt.text.count("-") >= 1
        for text in (prompt.answer, rf"so \boxed{{{prompt.answer}}}", f"<answer> {prompt.answer}\n</answer>"):
            assert tasks.verify(prompt, text)


def test_partial_credit_is_not_correct():
    prompt = prompts("chain_sum", 1)[0]
    data = reasoning_gym._dataset("chain_sum", 3, "{}")
    entry = data[prompt.columns["gym_index"]]
    text = f"maybe {prompt.answer} or so"
    assert 0 < data.score_answer(text, entry) < 1  # the credit for junk this guards against
    assert not tasks.verify(prompt, text)


def test_an_answer_that_the_scorer_raises_on_is_wrong(monkeypatch):
    prompt = prompts("chain_sum", 1)[0]
    data = reasoning_gym._dataset("chain_sum", 3, "{}")

    def raises(answer, entry):
        raise KeyError(answer)

    monkeypatch.setattr(data, "score_answer", raises)
    assert tasks.verify(prompt, prompt.answer) is False


def test_rows_are_scored_by_the_data_set_object_that_made_them():
    prompt = prompts("countdown", 1)[0]
    assert tasks.verify(prompt, prompt.answer)
    assert reasoning_gym._dataset("countdown", 3, "{}") is reasoning_gym._dataset("countdown", 3, "{}")


def test_unknown_tasks_and_options_are_refused_by_name():
    with pytest.raises(ValueError, match=r"reasoning_gym:no_such_task with options {}: Dataset 'no_such_task' not reg"):
        tasks.make("reasoning_gym:no_such_task", 1)
    with pytest.raises(ValueError, match=r"reasoning_gym:chain_sum with options .*terms.*unexpected keyword"):
        tasks.make("reasoning_gym:chain_sum", 1, terms=3)
