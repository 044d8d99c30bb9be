"""Loading Hugging Face folders: explicit dtypes, no dropout, safetensors only, paths checked first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdrl_pl import resources

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_model_path(path: str) -> str:
    """`path`, once it is sure that it names a folder with a model or can be a name on the hub.

    A model that comes with the library ("checkpoints/testbeds/...") is found from any working directory.

    Raises:
        FileNotFoundError: it looks like a folder and is none, or the folder holds no config.json. Without this check a
            misspelt folder ends in transformers' "couldn't connect".
    """
    folder = Path(resources.find(path)).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no config.json; expected a Hugging Face model folder")
        return str(folder)
    is_path = path.startswith((".", "~", "/")) or folder.parent.is_dir() or folder.parts[:1] == ("checkpoints",)
    if path.count("/") == 1 and not is_path:
        return path
    raise FileNotFoundError(
        f"no model folder at {path!r} (looked in {Path.cwd()}); give an existing folder or a hub name like 'org/model'"
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name, padding token guaranteed.

    Raises:
        FileNotFoundError: see `check_model_path`.
        ValueError: it cannot be loaded, or has no end-of-sequence token, so that no response could end.
    """
    from transformers import AutoTokenizer

    path = check_model_path(path)
    with _readable("tokenizer", path, "expected a folder with tokenizer.json and tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no eos_token; set one, or no response could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _readable(what: str, path: str, cure: str = "") -> Iterator[None]:
    """What transformers and safetensors say of a folder, with its name and the cure."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the {what} of {path} needs code of its own (auto_map in its config), which is never run; choose a "
                "model that transformers itself knows"
            ) from None
        if isinstance(error, SafetensorError):
            cure = "the file is damaged: copy it again"
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"the {what} of {path} cannot be loaded: {said}{cure and f'; {cure}'}") from error


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """V* = largest token id + 1: model rows beyond it are padding and are never sampled nor scored."""
    return max(tokenizer.get_vocab().values()) + 1


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None, extra: Iterable[int] | None = None
) -> list[int]:
    """All ids that end a response, sorted: the union of what tokenizer, generation config and caller name.

    Chat models often name several in the generation config (end of text, end of turn), only one of which is the
    tokenizer's.

    Args:
        tokenizer: its `eos_token_id`, if any.
        generation_config: its `eos_token_id`, a number, a list or None.
        extra: further ids.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    return sorted({int(token) for token in (tokenizer.eos_token_id, *configured, *(extra or ())) if token is not None})


def load_generation_config(path: str) -> GenerationConfig:
    """The generation config that a model of this folder or hub name gets, without its weights."""
    from transformers import AutoConfig, GenerationConfig

    path = check_model_path(path)
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # it has none of its own
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=False))


def revision(path: str) -> str | None:
    """The commit of a model of the hub; None for a folder, which `teacher.fingerprint` reads."""
    from transformers import AutoConfig

    path = check_model_path(path)
    if Path(path).is_dir():
        return None
    return getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "_commit_hash", None)


@lru_cache(maxsize=4)
def tokenizer_fingerprint(path: str) -> str:
    """16 hex digits over the ids of all tokens and of the end token of a model's tokenizer."""
    tokenizer = load_tokenizer(path)
    told = repr((sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id))
    return blake2b(told.encode(), digest_size=8).hexdigest()


def load_model(
    path: str,
    dtype: str = "float32",
    *,
    attn_implementation: str | None = None,
    quantization: dict[str, Any] | None = None,
    quantize_on: torch.device | str | None = None,
    from_scratch: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """A causal language model without dropout, and the names of the settings where dropout was switched off.

    Args:
        path: folder or hub name.
        dtype: "float32", "bfloat16" or "float16"; the checkpoint's own dtype is never taken silently.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; None is transformers' choice.
        quantization: arguments of transformers' `BitsAndBytesConfig`.
        quantize_on: device of quantised weights; None is transformers' choice, the current GPU where there is one. What
            bitsandbytes keeps beside 8-bit weights does not follow them to another device.
        from_scratch: random weights from config.json instead of stored ones.

    Raises:
        ValueError: unknown dtype, or a model that cannot be loaded: not safetensors, damaged, of a kind that
            transformers does not know, or with code of its own.
        FileNotFoundError: see `check_model_path`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    path = check_model_path(path)
    with _readable("config", path, "expected a causal language model that this version of transformers knows"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    silenced = _without_dropout(config)
    arguments: dict[str, Any] = {"dtype": DTYPES[dtype], "trust_remote_code": False}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if not from_scratch and Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise ValueError(
            f"{path} holds no *.safetensors; pickled weights could run code and are not loaded: load them where you "
            "trust them, and save_pretrained writes safetensors"
        )
    with _readable("model", path):
        if from_scratch:
            model = AutoModelForCausalLM.from_config(config, **arguments)
        else:
            if quantization is not None:
                arguments["quantization_config"] = BitsAndBytesConfig(**quantization)
                if quantize_on is not None:
                    arguments["device_map"] = {"": _place(torch.device(quantize_on))}
            model = AutoModelForCausalLM.from_pretrained(path, config=config, use_safetensors=True, **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, silenced


def _place(device: torch.device) -> str | int:
    """A device as transformers' device maps name it."""
    if device.type != "cuda":
        return device.type
    return torch.cuda.current_device() if device.index is None else device.index


def _without_dropout(config: PretrainedConfig) -> list[str]:
    """Sets every dropout rate of the config (and its sub-configs) to 0; the names of those that were not."""
    silenced = []
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            silenced += [f"{name}.{inner}" for inner in _without_dropout(value)]
        elif ("dropout" in name or name.endswith(("pdrop", "_drop"))) and isinstance(value, float) and value > 0:
            setattr(config, name, 0.0)
            silenced.append(name)
    return silenced
