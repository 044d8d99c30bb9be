"""Disagreement and pulls of single tokens, against numbers worked out by hand and against the losses themselves."""

from __future__ import annotations

import math

import pytest
import torch
from run_folders import stored_row

from kdrl_pl.losses.transforms import TRANSFORMS, Transform
from kdrl_pl.report.tokens import Objective, Token, disagreement, pieces, tokens_of


def test_tokens_of_a_row():
    tokens = tokens_of(stored_row(0), Objective(coef=0.5), None)
    assert [token.text for token in tokens] == ["‹5›", "‹6›", "‹7›"]
    assert [token.d for token in tokens] == [0.0, -2.0, 0.5]
    assert [token.level for token in tokens] == [0, -3, 2]
    assert [token.reward_pull for token in tokens] == [0.75] * 3
    assert [token.teacher_pull for token in tokens] == [0.0, -2.0, 0.25]  # the second: 0.5 · −2 · 0.25 / 0.125
    assert [token.clash for token in tokens] == [False, True, False]
    assert disagreement(tokens) == pytest.approx(2.5 / 3)
    assert tokens[1].words() == (
        "d -2.00 nats (student -0.50, teacher -2.50); reward up (+0.75); teacher down (-2.00); they clash"
    )


def test_a_masked_token_has_no_disagreement_whatever_stands_in_the_teachers_place():
    row = stored_row(0, kd_weights=[0.0, 0.125, 0.0], teacher_logprobs=[0.0, -2.5, 0.0])
    first, second, third = tokens_of(row, Objective(coef=0.5), None)
    assert first.masked and first.d is None and first.level == 0 and first.teacher_pull is None and not first.clash
    assert first.words() == "teacher not asked; reward up (+0.75); not distilled"
    assert (second.masked, second.d, third.masked) == (False, -2.0, True)


def test_rows_of_a_validation_have_no_pulls():
    row = stored_row(-1, token_weight=None, kd_weights=None, advantage=None)
    tokens = tokens_of(row, Objective(), None)
    assert [t.d for t in tokens] == [0.0, -2.0, 0.5]
    assert {(t.masked, t.reward_pull, t.teacher_pull) for t in tokens} == {(None, None, None)}


def test_the_student_before_the_updates_counts_where_it_is_known():
    (first, *_) = tokens_of(stored_row(0, old_logprobs=[-1.25, -1, -1]), Objective(), None)
    assert first.student == -1.25 and first.d == 1.0


def test_numbers_that_were_not_finite():
    row = stored_row(0, behavior_logprobs=[None, -0.5, -1.0], teacher_logprobs=[-1.0, None, -0.5])
    first, second, _ = tokens_of(row, Objective(coef=0.5), None)
    assert first.d is None and first.words().startswith("student's log-prob not known")
    assert second.d is None and second.teacher_pull is None


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("d", [-7.0, -0.3, 0.0, 0.3, 7.0])
def test_the_pull_is_that_of_the_loss(name, d):
    expected = Transform(name, 1.5)(torch.tensor(d, dtype=torch.float64)).item()
    assert Objective(0.5, "k2", name, 1.5).pull(d) == pytest.approx(expected, abs=1e-12)


def test_the_pull_of_the_forward_kl():
    assert Objective(estimator="forward_kl").pull(0.5) == pytest.approx(math.exp(0.5) - 1)


def byte_tokens(ids):
    """A tokenizer of one byte per token, as byte-level ones show parts of a character."""
    return bytes(ids).decode("utf-8", "replace")


def test_pieces_join_to_the_text():
    text = "a漢b😀é"
    made = pieces(list(text.encode()), byte_tokens)
    assert "".join(made) == text
    assert made == ["a", "", "", "漢", "b", "", "", "", "😀", "", "é"]


def test_broken_bytes_do_not_hold_up_the_rest():
    made = pieces([0xE6, 0xE6, 0xE6, 0xE6, 0xE6, 0x61, 0x62, 0x63], byte_tokens)
    assert "".join(made).endswith("abc") and made[-2:] == ["b", "c"]


def test_spaces_that_a_tokenizer_drops_at_the_start_of_a_text():
    words = ["▁a", "▁b", "c"]

    def decode(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert pieces([0, 1, 2, 1], decode) == ["a", " b", "c", " b"]


def test_levels():
    made = [Token("", 0.0, d, False, None, None).level for d in (0.09, -0.1, 0.5, -1.5, 4.0, -40.0)]
    assert made == [0, -1, 2, -3, 4, -4]
