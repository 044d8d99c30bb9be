"""Language models without numbers: built from config.json alone, they cost no memory and run the real code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch._subclasses.fake_tensor import FakeTensorMode

from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.models.loading import check_model_path, load_model, load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from torch import nn

    from kdrl_pl.models.adapters import Lora


class WeightlessModel(LanguageModel):
    """A `LanguageModel` of fake tensors. Comparing log-probs needs numbers: its checks are left out."""

    def check_head(self) -> float:
        return 0.0

    def check_shared_prompts(self) -> float:
        return 0.0


def weightless(
    path: str,
    dtype: str,
    world: FakeTensorMode,
    *,
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    adapter: Lora | None = None,
) -> WeightlessModel:
    """The model that `path` would be once loaded, with fake weights.

    Args:
        path: folder or hub name; its config.json is all that is read, and the tokenizer where it has one.
        dtype, gradient_checkpointing, adapter: as of `LanguageModel.load`; nothing is quantised here (models.py).
        world: models that exchange tensors share one.
        attn_implementation: likewise; for a kernel that needs a GPU stands "sdpa", which keeps the same tensors.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or transformers does not know its kind.
    """
    kernel = attn_implementation if attn_implementation in (None, "eager", "sdpa") else "sdpa"
    with world:
        model, _ = load_model(path, dtype, attn_implementation=kernel, from_scratch=True)
        if adapter is not None:
            adapter.wrap(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return WeightlessModel(model, _vocabulary(path, model))


def _vocabulary(path: str, model: nn.Module) -> int:
    """V*, or all rows of the head where there is no tokenizer to say that some of them are padding."""
    rows = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    folder = Path(check_model_path(path))
    has_none = folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*"))
    return rows if has_none else min(vocabulary_size(load_tokenizer(path)), rows)
