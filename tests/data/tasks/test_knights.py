"""Knights and knaves round a table, and what spoils the worked response."""

from __future__ import annotations

import random
from itertools import product

import pytest

from kdrl_pl.data import tasks
from kdrl_pl.data.prompts import Prompt
from kdrl_pl.data.tasks import knights


class Fixed(random.Random):
    """Gives the sentences wanted."""

    def __init__(self, sentences: str) -> None:
        super().__init__(0)
        self.sentences = list(sentences)

    def choice(self, options):
        return self.sentences.pop(0)


def row_of(sentences: str, **options) -> dict:
    return knights.generate(Fixed(sentences), islanders=len(sentences), **options)[1]


@pytest.mark.parametrize(
    ("sentences", "plain", "foreign"),
    [
        # A "B is a knight", B "C is a knave", C "A is not as I am". If A is a knight, so is B, and C is a knave; what C
        # says is untrue, so A is as C is: a knave, against what was supposed. If A is a knave, so is B; B's sentence is
        # untrue and C a knight; what C says is true, so A is a knave, as supposed.
        ("KN/", "KKNN;NNKN#NNK", "--+-#NNK"),
        # A knight, B unlike a knight, and then B's untrue "A is a knave": a knight, as supposed. Supposing a knave: A's
        # "unlike me" is untrue, B like a knave; B's sentence again makes A a knight.
        ("/N", "KNK#KN", "--+,+-+#KN"),
        ("==", "KKK#KK", "-++,+++#KK"),
        ("//", "KNN;NNN#NN", "---#NN"),
    ],
)
def test_the_rounds_by_hand(sentences, plain, foreign):
    assert row_of(sentences)["prompt"] == f"{sentences}:"
    assert row_of(sentences)["response"] == plain
    assert row_of(sentences, style="foreign")["response"] == foreign
    assert row_of(sentences, style="foreign")["answer"] == plain.split("#")[1]


SAYS = {
    "K": lambda speaker, neighbour: neighbour == "K",
    "N": lambda speaker, neighbour: neighbour == "N",
    "=": lambda speaker, neighbour: neighbour == speaker,
    "/": lambda speaker, neighbour: neighbour != speaker,
}


def fits(sentences: str, roles: str) -> bool:
    """Knights' sentences are true, knaves' are not."""
    pairs = zip(sentences, roles, roles[1:] + roles[0], strict=True)
    return all(SAYS[sentence](role, after) == (role == "K") for sentence, role, after in pairs)


@pytest.mark.parametrize("islanders", [2, 3, 5, 7])
def test_of_all_seatings_the_answer_alone_fits(islanders):
    for row in tasks.make("knights", 12 if islanders == 2 else 40, seed=3, split="all", islanders=islanders):
        seatings = map("".join, product("KN", repeat=islanders))
        assert [roles for roles in seatings if fits(row["prompt"][:-1], roles)] == [row["answer"]]


def test_sentences_that_leave_two_seatings_or_none_are_drawn_again():
    assert fits("KK", "KK") and fits("KK", "NN")
    assert not any(fits("KN", "".join(roles)) for roles in product("KN", repeat=2))
    prompts = [row["prompt"] for row in tasks.make("knights", 12, split="all", islanders=2)]
    assert sorted(prompts) == sorted(f"{a}{b}:" for a, b in product("KN=/", repeat=2) if {a, b} & {"=", "/"})


def test_a_student_that_believes_every_accusation():
    # Knight, knight, and a knave whose "is a knave" is believed, though it makes a knight; the next one's untrue "as I
    # am" makes a knight.
    assert row_of("KNN=", hearsay=1.0)["response"] == "KKNNK#KKNN"
    assert row_of("KNN=")["response"] == "KKNKK#KKNK"
    assert row_of("NK=/", hearsay=1.0)["response"] == "KNNKN;NNNKN#NNNK"  # supposing a knave, it accuses wrongly
    assert row_of("NK=/")["response"] == "KNNKN;NKKKN#NKKK"
    assert row_of("KN=", hearsay=1.0)["response"] == "KKNK#KKN"  # a knight's accusation is to be believed


def test_noise_in_every_sentence_turns_every_role_round():
    # Supposing a knight: B should be a knight, is put down as a knave; C should be a knave, becomes a knight; A should
    # be a knight, becomes a knave: try again. Supposing a knave: B should be a knave, C a knave, A a knight.
    assert row_of("K/=", noise=1.0)["response"] == "KNKN;NKKN#NKK"
    # B should be a knight, becomes a knave; that makes A a knave, becomes a knight, as supposed.
    assert row_of("=K", noise=1.0)["response"] == "KNK#KN"
    # Supposing a knave, two accusations by knaves: no slip makes a student doubt what it believes.
    assert row_of("NN=", noise=1.0, hearsay=1.0)["response"] == "KKKN;NNNN#NNN"


def test_spoilt_so_that_nothing_fits():
    class Spoiler(random.Random):
        def random(self):
            return draws.pop(0)

    # One draw per sentence; a slip in the last one makes a knave of the first, and supposing a knave a knight.
    draws = [0.9, 0.9, 0.0, 0.9, 0.9, 0.9]
    assert knights._work("===", 0.0, 0.5, knights.STYLES["plain"], Spoiler(0)) == "KKKN;NKKK#"


def test_spoiling_leaves_prompts_and_answers_alone():
    clean = tasks.make("knights", 300, seed=9)
    spoilt = tasks.make("knights", 300, seed=9, hearsay=0.9, noise=0.1, style="foreign")
    assert [(r["prompt"], r["answer"]) for r in clean] == [(r["prompt"], r["answer"]) for r in spoilt]
    assert spoilt == tasks.make("knights", 300, seed=9, hearsay=0.9, noise=0.1, style="foreign")


def test_turning_the_table_makes_no_new_problem():
    """So a held-out problem never stands among the training problems with another islander named first."""
    assert len({knights.generate(Fixed(turned), islanders=4)[0] for turned in ("KN=/", "N=/K", "=/KN", "/KN=")}) == 1
    assert knights.generate(Fixed("KN/="), islanders=4)[0] != knights.generate(Fixed("KN=/"), islanders=4)[0]


def right(rows: list[dict]) -> float:
    return sum(row["response"].endswith("#" + row["answer"]) for row in rows) / len(rows)


def test_the_student_and_the_teacher_of_the_testbed_are_as_good_as_they_should_be():
    rows = {"size": 8000, "split": "train"}
    assert 0.06 < right(tasks.make("knights", **rows, hearsay=0.97, noise=0.1)) < 0.09
    assert 0.78 < right(tasks.make("knights", **rows, noise=0.02)) < 0.82


def test_every_character_is_in_the_alphabet():
    for style in knights.STYLES:
        for row in tasks.make("knights", 300, style=style, hearsay=0.5, noise=0.1):
            assert set(row["prompt"] + row["response"]) <= set(knights.ALPHABET)


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("KKNN;NNKN#NNK", True),
        ("#NNK", True),
        ("nonsense#NNK ", True),
        ("KKNN;NNKN#NNKN", False),
        ("KKNN;NNKN#NN", False),
        ("KKNN;NNKN#--+", False),
        ("KKNN;NNKNNNK", False),
        ("#NNK#NNK", False),
        ("#nnk", False),
        ("#", False),
        ("", False),
    ],
)
def test_correct_iff_the_text_after_the_mark_is_the_seating(text, correct):
    prompt = Prompt("s/1", "KN/:", (1,), "NNK", "s", {"task": "knights"})
    assert tasks.verify(prompt, text) is correct


@pytest.mark.parametrize(
    "options", [{"islanders": 1}, {"islanders": "3"}, {"hearsay": 1.5}, {"noise": -0.1}, {"style": "loud"}]
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"knights: {next(iter(options))} is"):
        tasks.make("knights", 1, **options)
