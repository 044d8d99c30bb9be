"""The student as another program reads it: a Hugging Face folder cut to V* rows, its head untied.

The model may have more rows than the tokenizer has ids (padding). An engine that computes its own softmax would put
them into the normaliser; given a model of V* rows, it has nothing to mask. And a head that is the embedding (tied)
becomes a weight of its own: vLLM's CPU build keeps a packed copy of a tied head that new weights never reach.

    python -m kdrl_pl.rollout.plain_weights STUDENT FOLDER      # such a folder for a vLLM server to start on
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdrl_pl.rollout.weights import is_sharded

if TYPE_CHECKING:
    from kdrl_pl.models.language_model import LanguageModel


def write_config(student: LanguageModel, folder: Path, dtype: str) -> None:
    """Write the config.json of the student with V* rows and an untied head.

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
    config.tie_word_embeddings = text.tie_word_embeddings = False
    for name in ("pad_token_id", "bos_token_id"):
        if (getattr(text, name, None) or 0) >= student.vocab_size:
            setattr(text, name, None)  # a default of the config's class that this tokenizer does not have
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


@torch.no_grad()
def plain_weights(student: LanguageModel, rows: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The current weights under the names of the model's Hugging Face folder, one after the other, without gradient.

    A tied head is there under both of its names. An adapter (LoRA) is added to its base.

    Args:
        student: its weights lie whole on this process, see `parallel.gathered_weights`.
        rows: of embedding and head; further ones are cut off.
        dtype: they are cast to; a weight that has it already is a view.

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
        weights = merged_weights(model)
    else:
        weights = dict(_named_tensors(model))
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
    stored = revert_weight_conversion(model, weights)
    return ((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in stored.items())


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers. Not `state_dict()`: under FSDP2 that shards the weights again."""
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def write_folder(student: LanguageModel, folder: Path, dtype: str) -> None:
    """Write what a vLLM server is started on: config with V* rows and an untied head, and weights of zeros.

    The first rollout brings the student's; whatever it did not reach would then be found by `check_agreement`.

    Args:
        student: as it is.
        folder: is made.
        dtype: "float32", "bfloat16" or "float16".
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(student, folder, dtype)
    weights = plain_weights(student, student.vocab_size, getattr(torch, dtype))
    write_weights(((name, torch.zeros_like(tensor)) for name, tensor in weights), folder)


def write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write one safetensors file, in which no two weights share memory."""
    from safetensors.torch import save_file

    alone = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in weights}
    save_file(alone, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Command line of this module."""
    from kdrl_pl.models.language_model import LanguageModel
    from kdrl_pl.models.loading import DTYPES, load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="Hugging Face folder or hub name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args()
    write_folder(LanguageModel.load(options.student), options.folder, options.dtype)
    load_tokenizer(options.student).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
