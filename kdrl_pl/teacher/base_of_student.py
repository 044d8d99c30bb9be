"""The base of a LoRA student as its teacher: it keeps the student near what it was, and no second model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdrl_pl.models.adapters import EarlierStudent
from kdrl_pl.teacher.frozen import FrozenTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrl_pl.models.language_model import LanguageModel


class BaseTeacher(FrozenTeacher):
    """Scores with the student's own model, its adapter switched off; needs model.adapter.

    Args:
        max_tokens_per_micro_batch: tokens, padding counted, of one forward pass.

    Raises:
        ValueError: a budget below 1.
    """

    def __init__(self, max_tokens_per_micro_batch: int = 16384) -> None:
        super().__init__(path="", max_tokens_per_micro_batch=max_tokens_per_micro_batch)

    def lean_on(self, student: LanguageModel, path: str, base: str) -> None:
        """Take the student, once it is loaded, in place of a model of one's own.

        Args:
            student: an adapted one.
            path: the folder or hub name of its base.
            base: fingerprint of that.
        """
        self.path, self._base = path, base
        self.model = EarlierStudent(student)  # type: ignore[assignment]  # all that scoring asks of a model

    def load(self, device: torch.device | str, student_tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Nothing to load: the weights are the student's."""

    def fingerprint(self) -> str:
        """Names the base in checkpoints."""
        return self._base
