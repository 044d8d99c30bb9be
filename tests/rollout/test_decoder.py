"""Every optimisation on and off: the same samples, whatever the batch, the order and the place of a row in it."""

import numpy as np
import pytest
import torch
from engine_models import STOP, VOCABULARY, build

from kdrl_pl.rollout import decoder
from kdrl_pl.rollout.engine import RolloutInterrupted
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.streams import group_keys, uniforms

GROUP, BUDGET, STOPS = 3, 24, (STOP, 9, 33, 41, 57, 60)
# Twelve prompts of 1 to 14 tokens, longer and shorter than the sliding windows of 5 and 6.
PROMPTS = [
    [(7 * n + 3 * i) % 60 + 3 for i in range(length)]
    for n, length in enumerate([3, 14, 1, 7, 2, 9, 1, 4, 14, 5, 2, 11])
]
KEYS = group_keys(0, 0, [str(number) for number in range(len(PROMPTS))], [0] * len(PROMPTS), GROUP)


@pytest.fixture(scope="module")
def student():
    return build()


def roll(student, stops=STOPS, max_tokens=BUDGET, should_stop=None, **settings):
    engine = InProcessEngine(**settings)
    engine.sync(student, stops)
    return engine.generate(PROMPTS, GROUP, Sampling(max_tokens=max_tokens), KEYS, should_stop)


def running_sum(student, prompt, tokens):
    """(V*,) float64 running sum of the next token's probabilities, by a forward over the whole row."""
    with torch.no_grad():
        logits = student.model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1, :VOCABULARY]
    return logits.double().softmax(-1).cumsum(-1).numpy()


def assert_same_samples(student, one, two):
    """Equal rows; one that differs does so first at a draw within 1e-5 of an edge between two words. Few do."""
    close = 0
    for row, (a, b) in enumerate(zip(one.token_ids, two.token_ids, strict=True)):
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            edges = running_sum(student, PROMPTS[row // GROUP], a[:at])
            assert np.abs(edges - uniforms([KEYS[row]], at, 1)[0, 0]).min() < 1e-5, f"row {row}, token {at}"
            close += 1
            continue
        assert one.logprobs[row] == pytest.approx(two.logprobs[row], abs=3e-5)
        assert one.finished[row] == two.finished[row]
    assert close <= 1


SETTINGS = [{"refill": False}, {}, {"compact_at": 1e-6}, {"compact_at": 1.0}]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gemma3"])
def test_samples_are_those_without_refill(name):
    # Red: a wrong column, position, mask or random number of a newcomer; a window that counts another row's columns.
    student = build(name)
    whole = roll(student)  # all rows at once
    lengths = [len(tokens) for tokens in whole.token_ids]
    assert min(lengths) <= 3 and max(lengths) == BUDGET and len(set(lengths)) >= 10
    for settings in SETTINGS:
        assert_same_samples(student, whole, roll(student, max_rows=7, **settings))


@pytest.mark.parametrize("max_rows", [1, 4, 20])  # all of them cut through groups
def test_samples_do_not_depend_on_the_number_of_lines(student, max_rows):
    assert_same_samples(student, roll(student), roll(student, max_rows=max_rows))


def test_logprobs_of_newcomers_equal_a_plain_forward(student):
    done = roll(student, max_rows=4)
    for row, (tokens, logprobs) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        for t in (0, len(tokens) - 1):
            edges = np.diff(running_sum(student, PROMPTS[row // GROUP], tokens[:t]), prepend=0.0)
            assert logprobs[t] == pytest.approx(np.log(edges[tokens[t]]), abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"max_rows": 4}, {"max_rows": 7, "refill": False}])
def test_looking_seldom_changes_nothing(student, settings, monkeypatch):
    # As on a GPU: rows go on for up to seven tokens behind their stop token, and never past their budget.
    often = roll(student, **settings)
    monkeypatch.setitem(decoder._CHECK_EVERY, "cpu", 8)
    assert_same_samples(student, often, roll(student, **settings))
    gpt2 = build("gpt2")  # 64 positions: one too many raises
    assert len(roll(gpt2, max_tokens=51, **settings)) == len(KEYS)


@pytest.mark.parametrize("settings", [{"max_tokens": 1}, {"stops": range(VOCABULARY)}, {"max_tokens": 2}])
def test_rows_that_end_at_once(student, settings):
    done = roll(student, max_rows=4, **settings)
    assert_same_samples(student, done, roll(student, **settings))
    assert {len(tokens) for tokens in done.token_ids} <= {1, settings.get("max_tokens", 1)}


@pytest.mark.parametrize("budget", [130, 65])  # more tokens than two blocks of random numbers; lines taken in between
def test_blocks_of_random_numbers(student, budget):
    whole = roll(student, max_tokens=budget, stops=(STOP,))
    assert max(len(tokens) for tokens in whole.token_ids) > 64
    assert_same_samples(student, whole, roll(student, max_tokens=budget, stops=(STOP,), max_rows=5))


def watched(student, **settings):
    """What `roll` returns, and (lines, new tokens, columns of the mask) of each forward."""
    shapes = []

    def watch(_, __, inputs):
        mask = inputs.get("attention_mask")
        shapes.append((*inputs["input_ids"].shape, None if mask is None else mask.shape[1]))

    hook = student.model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        return roll(student, **settings), shapes
    finally:
        hook.remove()


def test_refill_reads_each_prompt_once_and_keeps_the_lines_busy(student, monkeypatch):
    monkeypatch.setitem(globals(), "PROMPTS", [[5, *prompt] for prompt in PROMPTS])  # none of one token
    done, shapes = watched(student, max_rows=6, compact_at=1e-6)
    assert sum(lines for lines, new, _ in shapes if new > 1) == len(PROMPTS)
    steps = [lines for lines, new, _ in shapes if new == 1]
    assert max(steps) == 6
    tokens = sum(len(tokens) - 1 for tokens in done.token_ids)  # the first of each comes with its prompt
    # A line whose first token ends it waits one step for the next row.
    assert tokens <= sum(steps) <= tokens + sum(len(tokens) == 1 for tokens in done.token_ids)
    assert steps[: len(steps) // 2] == [6] * (len(steps) // 2)
    _, batches = watched(student, max_rows=6, refill=False)
    assert len(shapes) < 0.75 * len(batches)


def test_the_batch_does_not_grow_wider_than_its_longest_row(student):
    # Red: columns that no line uses any more stay; thirty-six rows of up to 24 tokens would need 200 columns.
    done, shapes = watched(student, max_rows=4)
    assert len(shapes) > 100
    assert max(columns for _, _, columns in shapes if columns) <= max(map(len, PROMPTS)) + BUDGET
    shapes = watched(student, compact_at=1e-6)[1]
    longest = [row for row, tokens in enumerate(done.token_ids) if len(tokens) == BUDGET]
    assert shapes[-1][2] in (None, max(len(PROMPTS[row // GROUP]) for row in longest) + BUDGET - 1)


@pytest.mark.parametrize("calls", [0, 1, 5, 40])
def test_stops_within_one_token_step_while_rows_change(student, calls):
    polled = []

    def should_stop():
        polled.append(1)
        return len(polled) > calls

    with pytest.raises(RolloutInterrupted):
        roll(student, max_rows=4, should_stop=should_stop)
    assert len(polled) == calls + 1
    _, shapes = watched(student, max_rows=4, should_stop=lambda: bool(polled.append(1)))
    assert len(polled) == calls + 1 + len(shapes)
