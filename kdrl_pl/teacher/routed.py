"""Several teachers, each for its own prompts: one for mathematics, one for code."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdrl_pl.errors import TeacherLost
from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Head
from kdrl_pl.teacher.frozen import FrozenTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrl_pl.models.language_model import LanguageModel


class RoutedTeacher(FrozenTeacher):
    """Every prompt is scored by the teacher that its row names (`teacher` or `teacher_column` of a set in `data`).

    The teachers may be of any kind, size and precision, each with its own `offload`, `sharded` and `cache`; all share
    the student's tokenizer and end their responses with the same tokens.

    Args:
        teachers: name -> teacher; a null, which an overlay may set, takes one away.
        default: name of the teacher of rows that name none; null refuses such rows.

    Raises:
        ValueError: there is no teacher, or `default` is none of them.
    """

    def __init__(self, teachers: dict[str, FrozenTeacher | None], default: str | None = None) -> None:
        self.teachers = {name: teacher for name, teacher in sorted(teachers.items()) if teacher is not None}
        if not self.teachers:
            raise ValueError("teacher.teachers is empty; expected name: {path: ...} for each teacher")
        if default is not None and default not in self.teachers:
            raise ValueError(f"teacher.default is {default!r}; expected one of {', '.join(self.teachers)}, or null")
        self.default, self.model, self.score_metrics = default, None, {}
        self._head: Head | None = None

    @property
    def is_loaded(self) -> bool:
        return all(teacher.is_loaded for teacher in self.teachers.values())

    @property
    def whole_vocabulary(self) -> str | None:
        """Why forms that read the teacher's whole vocabulary cannot have it, with the cure; None where they can."""
        reasons = (teacher.whole_vocabulary for teacher in self.teachers.values())
        return next((reason for reason in reasons if reason is not None), None)

    def check_names(self, named: Iterable[tuple[str, str | None]]) -> None:
        """Refuse a prompt whose teacher is none of ours.

        Args:
            named: (uid, name of its teacher or None) of every prompt.

        Raises:
            ValueError: names the first such prompt.
        """
        for uid, name in named:
            self._teacher_of(uid, name)

    def _teacher_of(self, uid: str, name: str | None) -> str:
        chosen = self.default if name is None else name
        if chosen in self.teachers:
            return chosen
        known = ", ".join(self.teachers)
        if name is None:
            raise ValueError(
                f"row {uid} names no teacher, and there is no default; set model.teacher.default to one of {known}, or "
                "teacher (or teacher_column) of its set in data"
            )
        raise ValueError(
            f"row {uid} names the teacher {name!r}; expected one of {known}: correct the row, or add that teacher to "
            "model.teacher.teachers"
        )

    def load(self, device: torch.device | str, student_tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Load every teacher onto `device`, once.

        Raises:
            ValueError: a tokenizer is another one than the student's, or two teachers end responses differently.
        """
        self.stop_ids()
        for teacher in self.teachers.values():
            teacher.load(device, student_tokenizer)

    def sampler(self) -> LanguageModel:
        raise ValueError(
            "rollout.policy is teacher, and there are several; set model.teacher to the one that is to answer"
        )

    @torch.no_grad()
    def score(self, experience: Experience, asked: Tensor, *, hidden: bool = False) -> None:
        """Fill in `teacher_logprobs` (and `teacher_hidden` when wanted) where `asked`, each row by its own teacher.

        Args:
            experience, asked: see `FrozenTeacher.score`.
            hidden: the hidden states of all teachers side by side, (B, T, sum of H_T), zero but for the row's own, so
                that one product with `head` gives every row its teacher's logits.

        Raises:
            ValueError: a row names an unknown teacher.
            TeacherLost: one of them is; the others have answered then, since they may score in step with other ranks.
        """
        chosen = [self._teacher_of(*pair) for pair in zip(experience.uids, experience.teachers, strict=True)]
        experience.teacher_logprobs = torch.zeros(asked.shape, dtype=torch.float32, device=experience.device)
        weight = self.head().weight if hidden else None
        if weight is not None and bool(asked.any()):
            shape = (*asked.shape, weight.shape[1])
            experience.teacher_hidden = torch.zeros(shape, dtype=weight.dtype, device=experience.device)
        start, self.score_metrics, lost = 0, {}, None
        for name, teacher in self.teachers.items():  # on every rank in the same order, rows or not
            rows = torch.tensor([i for i, mine in enumerate(chosen) if mine == name], dtype=torch.int64)
            part = experience[rows]
            width, rows = part.input_ids.shape[1], rows.to(experience.device)
            try:
                teacher.score(part, asked[rows, :width], hidden=hidden)
            except TeacherLost as error:
                lost = lost or error
                continue
            experience.teacher_logprobs[rows, :width] = part.teacher_logprobs
            for metric, (value, count) in teacher.score_metrics.items():
                before = self.score_metrics.get(metric, (0.0, 0.0))
                self.score_metrics[metric] = before[0] + value, before[1] + count
            if weight is not None:
                states, size = part.teacher_hidden, teacher.head().weight.shape[1]
                if states is not None:
                    experience.teacher_hidden[rows, :width, start : start + size] = states.to(weight.dtype)
                    experience.teacher_hidden[rows, :width, start + size] = 1.0
                start += size + 1
        if lost is not None:
            raise lost

    def head(self) -> Head:
        """One head for all teachers: theirs side by side, a column for the bias behind each.

        Raises:
            ValueError: their logits are capped differently.
        """
        if self._head is None:
            heads = {name: teacher.head() for name, teacher in self.teachers.items()}
            caps = {name: head.softcap for name, head in heads.items()}
            if len(set(caps.values())) > 1:
                raise ValueError(
                    f"the teachers cap their logits differently ({caps}), so that no one head serves all; set "
                    "model.distillation.estimator: k2"
                )
            dtype = functools.reduce(torch.promote_types, (head.weight.dtype for head in heads.values()))
            columns = []
            for head in heads.values():
                weight = head.weight[: head.words]  # rows beyond V* are no words, and each model has its own number
                bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias[: head.words]
                columns += [head.scale * weight.to(dtype), head.scale * bias.to(dtype)[:, None]]
            self._head = Head(torch.cat(columns, 1), softcap=next(iter(caps.values())))
        return self._head

    def stop_ids(self) -> list[int]:
        """Ids that end a response, the same for every teacher.

        Raises:
            ValueError: they are not.
        """
        ids = {name: teacher.stop_ids() for name, teacher in self.teachers.items()}
        if len({tuple(sorted(own)) for own in ids.values()}) > 1:
            raise ValueError(
                f"the teachers end their responses with different tokens: {ids}. They are compared with the student's "
                "as one word, the same for all rows, and what ends one teacher's response is a word of another's; set "
                "eos_token_id in their generation_config.json to the same ids"
            )
        return next(iter(ids.values()))

    def fingerprint(self) -> str:
        """Names all teachers, and which of them is the default, in checkpoints."""
        named = ", ".join(f"{name}={teacher.fingerprint()}" for name, teacher in self.teachers.items())
        return f"{named}; default {self.default}"
