"""Student, teachers and reference of a run without numbers, and what they weigh at rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kdrl_pl.estimate.weightless import WeightlessModel, weightless
from kdrl_pl.models.sharding import layers_of
from kdrl_pl.teacher import BaseTeacher, FrozenTeacher, RemoteTeacher, RoutedTeacher

if TYPE_CHECKING:
    from kdrl_pl.models.language_model import LanguageModel
    from kdrl_pl.module import KDRLModule

NF4_BLOCK = 64  # weights that share one fp32 scale in the 4-bit form


@dataclass
class Models:
    """What is loaded on a rank.

    Args:
        student: as a step computes with it: under FSDP2 in the dtype that its weights are gathered in.
        at_rest: as it is kept.
        teachers: in this process; none where they answer from elsewhere or are the student's own base.
        has_reference: a second copy of the student's weights is kept (KL to a reference).
        quantization: of the student's frozen base.
    """

    student: WeightlessModel
    at_rest: WeightlessModel
    teachers: list[FrozenTeacher]
    has_reference: bool
    quantization: str | None


def without_numbers(module: KDRLModule, gathered_in: str | None = None) -> Models:
    """Gives a module that has not loaded anything a student and a teacher without numbers.

    Args:
        module: changed in place.
        gathered_in: dtype that FSDP2 gathers the student's weights in; None = its own.
    """
    world = FakeTensorMode(allow_non_fake_inputs=True)

    def student(dtype: str) -> WeightlessModel:
        return weightless(
            module.student_path,
            dtype,
            world,
            attn_implementation=module.attn_implementation,
            gradient_checkpointing=module.gradient_checkpointing,
            adapter=module.adapter,
        ).train()

    at_rest = student(module.dtype_name)
    module.student = computing = at_rest if gathered_in is None else student(gathered_in)
    teachers = in_process(module.teacher) if module.needs_teacher else []
    for teacher in teachers:
        teacher.model = weightless(teacher.path, teacher.dtype, world, attn_implementation=teacher.attn_implementation)
        teacher.model.eval().requires_grad_(False)
    both = [computing, at_rest, *(teacher.model for teacher in teachers)]
    for model in both:  # one tokenizer; where it is not there, the narrowest model has the least padding
        model.vocab_size = min(other.vocab_size for other in both)
    if isinstance(module.teacher, BaseTeacher):
        module._lend_base()
    elif teachers:
        module.teacher = max(teachers, key=lambda teacher: count(teacher.model))  # of several, whose pass takes most
    has_reference = module.reference is not None and module.adapter is None
    quantization = None if module.adapter is None else module.adapter.quantization
    return Models(computing, at_rest, teachers, has_reference, quantization)


def in_process(teacher: FrozenTeacher | None) -> list[FrozenTeacher]:
    """The teachers that a process loads for this one."""
    if isinstance(teacher, RoutedTeacher):
        return [each for inner in teacher.teachers.values() for each in in_process(inner)]
    return [] if teacher is None or isinstance(teacher, (RemoteTeacher, BaseTeacher)) else [teacher]


def count(model: nn.Module) -> int:
    """Weights, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_counts(model: LanguageModel) -> tuple[int, int]:
    """Weights of the largest decoder layer, and of all that is in none: embeddings, head, last norm."""
    layers = [count(layer) for layer in layers_of(model)]
    return max(layers), count(model) - sum(layers)


def bytes_at_rest(model: LanguageModel, quantization: str | None = None) -> int:
    """Weights and buffers. bitsandbytes quantises frozen linear layers but the head: LLM.int8 keeps a byte a weight
    and an fp32 scale per output row, nf4 half a byte and an fp32 scale per 64 weights."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    if quantization is None:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    linear = {id(weight) for weight in quantised(model)}
    total = 0.0
    for tensor in tensors:
        if id(tensor) not in linear:
            total += tensor.numel() * tensor.element_size()
        elif quantization == "8bit":
            total += tensor.numel() + 4 * tensor.shape[0]
        else:
            total += tensor.numel() * (0.5 + 4 / NF4_BLOCK)
    return round(total)


def quantised(model: LanguageModel) -> list[Tensor]:
    """Weights that bitsandbytes would quantise."""
    head = model.model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return [layer.weight for layer in layers if not layer.weight.requires_grad or model.training is False]


def dequantised_bytes(model: LanguageModel, quantization: str | None, dtype: torch.dtype) -> int:
    """The largest quantised weight as a product reads it; LLM.int8 multiplies without."""
    if quantization != "4bit":
        return 0
    return max(weight.numel() for weight in quantised(model)) * dtype.itemsize
