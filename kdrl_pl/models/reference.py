"""The reference of `losses.ReferenceKL`: a frozen copy of the student, replaced now and then by a newer one.

Of a LoRA student only the adapter is copied, and none at the start: its base is there already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdrl_pl.models.adapters import EarlierStudent
from kdrl_pl.models.language_model import LanguageModel


class Reference:
    """The student as it was.

    A plain object outside the module tree, like the teacher: as a submodule it would be trained, wrapped and saved.

    Args:
        path, dtype, attn_implementation: of the starting student, see `LanguageModel.load`.
    """

    def __init__(self, path: str, dtype: str, attn_implementation: str | None = None) -> None:
        self.path, self.dtype, self.attn_implementation = path, dtype, attn_implementation
        self.model: LanguageModel | EarlierStudent | None = None
        self.is_starting_student = True

    def lean_on(self, student: LanguageModel) -> None:
        """Ask a LoRA student itself, with the adapter it had, instead of a copy of it."""
        self.model = EarlierStudent(student)

    def load(self, device: torch.device | str) -> None:
        """Load the starting student onto `device`, once."""
        if self.model is None:
            model = LanguageModel.load(self.path, self.dtype, attn_implementation=self.attn_implementation)
            self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def reset(self, student: nn.Module) -> None:
        """Become a copy of `student`, which may be sharded; every rank calls it."""
        if isinstance(self.model, EarlierStudent):
            self.model.load_state_dict(student.state_dict())
        else:
            own = self.model.state_dict()
            for name, value in student.state_dict().items():  # one whole tensor at a time
                own[name].copy_(_whole(value))
        self.is_starting_student = False

    def state_dict(self) -> dict[str, Any] | None:
        """The weights; None for those of the starting student, which lie on disk."""
        return None if self.is_starting_student else self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.model.load_state_dict(state)
            self.is_starting_student = False


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
