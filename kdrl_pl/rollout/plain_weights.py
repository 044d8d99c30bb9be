"""The student as another program reads it: config and weights of a Hugging Face folder, cut to V* rows.

The model may have more rows than the tokenizer has ids (padding). An engine that computes its own softmax would put them
into the normaliser; where it is given a model of V* rows, there is nothing to mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdrl_pl.rollout.weights import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdrl_pl.models.language_model import LanguageModel


def model_rows(model: PreTrainedModel) -> int:
    """Rows of the output head, padding included."""
    return int(model.get_output_embeddings().weight.shape[0])


def write_config(student: LanguageModel, folder: Path, dtype: str) -> None:
    """Write the config.json of the student with V* rows.

    Args:
        student: its config is left as it is.
        folder: exists.
        dtype: "float32", "bfloat16" or "float16", of the weights in the other program.
    """
    model = student.model
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard renames the classes it wraps
    config.dtype = getattr(torch, dtype)
    text = config.get_text_config()
    text.vocab_size = student.vocab_size
    for name in ("pad_token_id", "bos_token_id"):
        if (getattr(text, name, None) or 0) >= student.vocab_size:
            setattr(text, name, None)  # a default of the config's class that this tokenizer does not have
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


@torch.no_grad()
def plain_weights(student: LanguageModel, rows: int) -> dict[str, Tensor]:
    """The current weights under the names of the model's Hugging Face folder, most of them views, none with gradient.

    A weight that stands in two places (a tied head) is there once. An adapter (LoRA) is added to its base.

    Args:
        student: its weights lie whole on this process, see `parallel.gathered_weights`.
        rows: of embedding and head; further ones are cut off.

    Raises:
        ValueError: the weights are quantised, or adapted and sharded at once.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = student.model
    if hasattr(model, "peft_config"):
        from kdrl_pl.models.adapters import merged_weights

        if is_sharded(student):
            raise ValueError(
                "the student has an adapter and is sharded (FSDP2), and its merged weights cannot be handed to another "
                "program; use the in-process rollout engine, or train without model.adapter or with another strategy"
            )
        weights = _each_once(merged_weights(model).items())
    else:
        weights = _each_once(_named_tensors(model))
    for name, tensor in weights.items():
        if not tensor.is_floating_point() and tensor.dtype != torch.int64:
            raise ValueError(
                f"{name} is {tensor.dtype}: quantised weights cannot be handed to another program; use the in-process "
                "rollout engine"
            )
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    for path, module in model.named_modules():
        for name in (f"{path}.weight", f"{path}.bias"):
            if any(module is end for end in ends) and name in weights:
                weights[name] = weights[name][:rows]
    return revert_weight_conversion(model, weights)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers. Not `state_dict()`: under FSDP2 that shards the weights again."""
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _each_once(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Without those that are others under a second name."""
    places = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors:
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in places:
            kept[name] = tensor
        places.add(place)
    return kept
