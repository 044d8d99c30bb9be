"""From a checkpoint to a Hugging Face folder that transformers (and what reads its format) loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdrl_pl.models.adapter_files import load_adapted, save_adapter
from kdrl_pl.models.adapters import merged_weights
from kdrl_pl.models.loading import check_model_path, load_model, load_tokenizer
from kdrl_pl.shards import read_checkpoint, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "student.model."


def export_checkpoint(
    checkpoint: Path, student_path: str, output: Path, dtype: str | None = None, adapter_only: bool = False
) -> None:
    """Write the student of a checkpoint, with tokenizer and generation config, as safetensors.

    An adapter (LoRA) is added to its base, so that the folder holds an ordinary model.

    Args:
        checkpoint: a single file, or the folder of a sharded one.
        student_path: the folder or hub name the run started from: its config and tokenizer are taken.
        output: folder to write; must not hold files yet.
        dtype: "float32", "bfloat16" or "float16"; None keeps the master weights' own.
        adapter_only: write the adapter alone, as a folder of peft's.

    Raises:
        FileExistsError: `output` holds files.
        ValueError: the checkpoint's weights are not those of the model, or it holds none, or more than plain values;
            or an adapter alone is wanted of one that has none.
    """
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another folder with --output")
    content = read_checkpoint(checkpoint)
    state = content.get("state_dict", {}) if isinstance(content, dict) else {}
    weights = {name.removeprefix(PREFIX): whole(value) for name, value in state.items() if name.startswith(PREFIX)}
    if not weights:
        raise ValueError(f"{checkpoint} holds no student; expected a checkpoint of kdrl fit or kdrl sft")
    adapter = content.get("kdrl", content).get("adapter")  # kdrl sft has no "kdrl"
    if adapter is not None:
        adapted = load_adapted(student_path, adapter, weights)
        if adapter_only:
            return save_adapter(adapted, student_path, output)
        weights, dtype = merged_weights(adapted), dtype or adapter["dtype"]
    elif adapter_only:
        raise ValueError(f"{checkpoint} holds a whole student, and no adapter; leave out --adapter")
    own = next(iter(weights.values())).dtype
    model, _ = load_model(student_path, dtype or str(own).removeprefix("torch."), from_scratch=True)
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected or weights[name].shape != expected[name].shape]
    if missing or unexpected:
        raise ValueError(
            f"the weights of {checkpoint} are not those of {student_path}: missing {missing[:3]}, unexpected (or of "
            f"another shape) {unexpected[:3]}"
        )
    model.load_state_dict(weights)
    model.save_pretrained(output)
    load_tokenizer(student_path).save_pretrained(output)
    _copy_configs(check_model_path(student_path), model, output)


def _copy_configs(path: str, model: PreTrainedModel, output: Path) -> None:
    """The student's own: in ours dropout is 0, and a generation config made from it knows but one end token."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(
        path, trust_remote_code=False, dtype=model.dtype, architectures=[type(model).__name__]
    )
    config.save_pretrained(output)
    try:
        GenerationConfig.from_pretrained(path).save_pretrained(output)
    except OSError:  # it has none
        (output / "generation_config.json").unlink(missing_ok=True)
