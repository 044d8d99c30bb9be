"""An adapter between checkpoint and folder: what its base is called, the adapted model anew, a folder of peft's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kdrl_pl.models.adapters import NAME, Lora, adapter_weights
from kdrl_pl.models.loading import check_model_path, load_model, load_tokenizer
from kdrl_pl.models.quantization import quantization_arguments
from kdrl_pl.teacher.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def name_of_base(adapter: Lora, path: str, dtype: str) -> str:
    """Names the weights that an adapter is trained on.

    Args:
        adapter: may have them quantised.
        path: their folder or hub name.
        dtype: of them, where they are not quantised.
    """
    return f"{fingerprint(check_model_path(path))}/{adapter.quantization or dtype}"


def adapter_state(adapter: Lora, path: str, dtype: str) -> dict[str, Any]:
    """What a checkpoint says of an adapter: all that makes a model of its weights.

    Args:
        adapter, path, dtype: as of `name_of_base`.
    """
    return {**adapter.settings(), "dtype": dtype, "base": name_of_base(adapter, path, dtype)}


def keep_trained(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Leave the weights of a frozen base out of a checkpoint of `model`."""
    trained = adapter_weights(model)
    checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in trained}


def load_adapted(path: str, saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model of a checkpoint that holds an adapter: its base is loaded anew, in float32 where it is not quantised.

    Args:
        path: folder or hub name of the base.
        saved: what the checkpoint says of the adapter, see `adapter_state`.
        weights: of the adapter, by their names in the model.

    Raises:
        ValueError: the model at `path` is another than the adapter's base.
    """
    settings = {name: value for name, value in saved.items() if name not in ("dtype", "base")}
    lora, dtype = Lora(**settings), saved["dtype"]
    if (here := name_of_base(lora, path, dtype)) != saved["base"]:
        raise ValueError(f"the adapter was trained on base {saved['base']}, and {path} is {here}; name its own base")
    quantization = quantization_arguments(lora.quantization, dtype)
    model, _ = load_model(path, dtype if quantization else "float32", quantization=quantization)
    lora.wrap(model)
    if weights.keys() != adapter_weights(model).keys():
        raise ValueError(f"the layers of the adapter are not those of {path}; name its own base")
    model.load_state_dict(weights, strict=False)
    return model


def save_adapter(model: PreTrainedModel, path: str, output: Path) -> None:
    """Write the adapter as peft does, for `PeftModel.from_pretrained`, with the tokenizer of its base.

    Args:
        model: an adapted one.
        path: folder or hub name of its base.
        output: folder to write.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config: Any = model.peft_config[NAME]
    folder = Path(check_model_path(path))
    config.base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else path
    config.inference_mode = True
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    output.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in weights.items()},
        output / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(output)
    load_tokenizer(path).save_pretrained(output)
