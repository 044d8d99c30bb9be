import torch

from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.losses.overlap import WORDS, top_k_overlap


def test_the_share_of_the_students_favourites_that_are_the_teachers() -> None:
    # Red: places instead of words compared (the teacher ranks its words the other way round), or a share of the union.
    student = torch.arange(20.0).repeat(3, 1)  # favourites: words 12 ... 19
    teacher = torch.zeros(3, 20)
    teacher[0, 12:] = torch.arange(8.0, 0.0, -1.0)  # the same
    teacher[1, 8:16] = 1.0  # words 12 ... 15 of them
    teacher[2, :8] = 1.0  # none
    overlap = top_k_overlap(Vocabulary(student.requires_grad_(), torch.zeros(3, dtype=torch.int64), teacher))
    assert WORDS == 8
    assert overlap.tolist() == [1.0, 0.5, 0.0]
    assert not overlap.requires_grad


def test_a_vocabulary_smaller_than_that_and_no_position() -> None:
    few = torch.zeros(2, 5)
    assert top_k_overlap(Vocabulary(few, torch.zeros(2, dtype=torch.int64), few)).tolist() == [1.0, 1.0]
    assert top_k_overlap(Vocabulary(few[:0], torch.zeros(0, dtype=torch.int64), few[:0])).shape == (0,)
