"""LoRA (arXiv 2106.09685): the base stays as it is, and small matrices beside its layers are trained.

A layer computes `W x + (alpha / rank) B A x`, B starting at zero: the first student is the base. peft's layers are put
into the transformers model itself, which remains the class it was. So all that reads a student reads an adapted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdrl_pl.models.quantization import quieten_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdrl_pl.logprobs import Head
    from kdrl_pl.models.language_model import LanguageModel, TokenLogprobs

NAME = "default"  # peft's name of a model's first adapter, and so part of the names of its weights


class Lora:
    """Trains a low-rank adapter of the student instead of its weights; needs `pip install 'kdrl_pl[lora]'`.

    Only the adapter has gradients and optimizer state, and stands in checkpoints. It is kept in float32, whatever the
    dtype of the base.

    Args:
        rank: columns of B, rows of A.
        alpha: the product B A is multiplied by alpha / rank.
        dropout: must be 0: the old, the current and the sampling policy have to be the same function.
        target_modules: layers that get one: the ends of their names, a regular expression over whole names, or
            "all-linear" for every linear layer but the head.
        modules_to_save: modules that are trained whole beside it, by the ends of their names, such as lm_head.
        quantization: of the frozen base: "4bit" (nf4: QLoRA, arXiv 2305.14314), through bitsandbytes; null keeps it in
            model.dtype. LLM.int8 also rounds what the layers read, so that the policy that samples is another one.
        seed: of the random start of A.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        modules_to_save: list[str] | None = None,
        quantization: str | None = None,
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"model.adapter.rank is {rank}; expected at least 1")
        if not alpha > 0:
            raise ValueError(f"model.adapter.alpha is {alpha}; expected a positive number, such as twice the rank")
        if dropout != 0:
            raise ValueError(
                f"model.adapter.dropout is {dropout}; it must be 0: dropout is off everywhere, because the policy that "
                "sampled, the old one and the current one have to be the same function"
            )
        if not target_modules:
            raise ValueError("model.adapter.target_modules is empty; name layers, or all-linear")
        if quantization not in (None, "4bit"):
            raise ValueError(
                f"model.adapter.quantization is {quantization!r}; expected null or 4bit (LLM.int8 rounds "
                "activations too: sampler and trainer would be two policies, 5e-4 nats apart on the quick start)"
            )
        self.rank, self.alpha = rank, alpha
        self.target_modules, self.modules_to_save = target_modules, modules_to_save
        self.quantization, self.seed = quantization, seed

    def settings(self) -> dict[str, Any]:
        """What a checkpoint says of the adapter: all that its weights alone do not."""
        names = ("rank", "alpha", "target_modules", "modules_to_save", "quantization")
        return {name: getattr(self, name) for name in names}

    def wrap(self, model: PreTrainedModel) -> None:
        """Put the adapter into `model` and freeze the rest.

        Raises:
            ValueError: peft is not installed; no layer has such a name; or the adapter would change a weight in one of
                two places where it is used.
        """
        quieten_bitsandbytes()  # which peft imports
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ValueError(f"model.adapter needs peft ({error}); pip install 'kdrl_pl[lora]'") from error
        if self.modules_to_save and model.dtype != torch.float32:
            raise ValueError(
                f"model.adapter.modules_to_save are trained whole, in model.dtype, and that is {model.dtype}: small "
                "steps would be rounded away; set model.dtype: float32"
            )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a number that is multiplied with
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.name_or_path,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                inject_adapter_in_model(config, model, NAME)
            except ValueError as error:
                raise ValueError(f"model.adapter does not fit {type(model).__name__}: {error}") from error
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        for module in model.modules():  # of bitsandbytes, on CPUs with AVX512-BF16: a form without a backward pass
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        _refuse_unsound(model)


def _refuse_unsound(model: PreTrainedModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if isinstance(ends[1], BaseTunerLayer):
        raise ValueError(
            "model.adapter.target_modules names the output head, whose logits are never computed as a layer here; "
            "train it whole: model.adapter.modules_to_save: [lm_head]"
        )
    if model.config.get_text_config().tie_word_embeddings and any(_layers(end) for end in ends):
        raise ValueError(
            f"model.adapter changes the embedding or the head of {type(model).__name__}, which are one weight "
            "(tie_word_embeddings): it would change in one of its two places; leave both out"
        )


def _layers(model: nn.Module) -> list[Any]:
    """peft's layers of a model, of both kinds: transformers' own `enable_adapters` forgets the second."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, by their names in `model`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapter_as(model: nn.Module, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside, the model has these adapter weights, or none at all: then it is its base. No gradient goes through.

    Args:
        model: an adapted one.
        weights: as `adapter_weights` names them; None switches the adapter off.
    """
    if weights is None:
        layers = _layers(model)
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
        return
    own = {name: (parameter, parameter.data) for name, parameter in adapter_weights(model).items()}
    try:
        for name, (parameter, _) in own.items():
            parameter.data = weights[name]
        yield
    finally:
        for parameter, data in own.values():
            parameter.data = data


class EarlierStudent:
    """The student as it was, with an earlier adapter or with none: asked in its place, without a second model.

    Args:
        student: an adapted one.
    """

    def __init__(self, student: LanguageModel) -> None:
        self.student = student
        self.adapter: dict[str, Tensor] | None = None  # None: the base

    @property
    def model(self) -> PreTrainedModel:
        """What engines sample with, and there is none.

        Raises:
            ValueError: always, with what to do instead.
        """
        raise ValueError(
            "a student with another adapter, or none, can only be scored; to sample from the base as rollout.policy: "
            "teacher would, run kdrl validate without --ckpt_path (and rollout.policy: student)"
        )

    @property
    def shares_prompts(self) -> bool:
        """See `LanguageModel.shares_prompts`."""
        return self.student.shares_prompts

    @torch.no_grad()
    def token_logprobs(self, *arguments: Any, **settings: Any) -> TokenLogprobs:
        """See `LanguageModel.token_logprobs`."""
        with adapter_as(self.student, self.adapter):
            return self.student.token_logprobs(*arguments, **settings)

    def head(self) -> Head:
        """See `LanguageModel.head`."""
        with adapter_as(self.student, self.adapter):
            return self.student.head()

    def state_dict(self) -> dict[str, Tensor] | None:
        """The adapter's weights."""
        return self.adapter

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Become the student with these weights, of which those of the adapter are copied."""
        own = adapter_weights(self.student)
        self.adapter = {name: weights[name].detach().to(p.device, p.dtype, copy=True) for name, p in own.items()}


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a plain model that computes what the adapted one does, under the plain model's names.

    Those of a quantised base are taken out of their 8 or 4 bits first, so that the adapter meets the base that it was
    trained on.

    Args:
        model: an adapted one; it is left as it is.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.integrations import dequantize_module_weight

    plain: dict[str, Tensor] = {}
    inside: list[str] = []  # prefixes of what peft's layers hold; parents come before their children
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if any(prefix.startswith(other) for other in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(prefix)
            layer: Any = module
            own = layer.get_base_layer()
            weight = dequantize_module_weight(own)
            plain[f"{prefix}weight"] = weight + layer.get_delta_weight(NAME).to(weight)
            if own.bias is not None:
                plain[f"{prefix}bias"] = own.bias
        elif isinstance(module, ModulesToSaveWrapper):
            inside.append(prefix)
            plain |= {f"{prefix}{name}": value for name, value in module.modules_to_save[NAME].state_dict().items()}
        else:
            kept = module.state_dict()
            plain |= {f"{prefix}{name}": kept[name] for name in kept if "." not in name}
    return plain
