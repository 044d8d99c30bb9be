"""Peak bytes of one forward pass of the teacher, of one micro-batch of an update, and of the optimizer's step.

All of them run the library's own code on models without numbers (live_bytes.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

from kdrl_pl.chunked_head import _Blocks
from kdrl_pl.estimate.live_bytes import LiveBytes, fake, nbytes
from kdrl_pl.estimate.plan import Plan, model_tensors, shared
from kdrl_pl.optim import make_optimizer


@dataclass(frozen=True)
class UpdateBytes:
    """What an update takes on top of what is held.

    Args:
        gradients: of all trained weights.
        activations: what the largest micro-batch needs at its peak; beside complete gradients, where an update has
            several, else with those that have arisen by then.
        state: of the optimizer, from its first step on.
        step: what a step takes for the moment.
        is_one: an update has one micro-batch.
    """

    gradients: int
    activations: int
    state: int
    step: int
    is_one: bool


def hidden_bytes(plan: Plan) -> int:
    """Teacher's hidden states of all rows, kept from scoring to update by forms that read its vocabulary."""
    if not keeps_hidden(plan):
        return 0
    weight = plan.module.teacher.head().weight
    longest = plan.prompt_tokens + max(plan.training.response_tokens)
    return plan.training.rows * longest * weight.shape[1] * weight.element_size()


def keeps_hidden(plan: Plan) -> bool:
    """Whether the objective reads the teacher's vocabulary at the first rollout."""
    return plan.module.needs_teacher and plan.module.objective.reads_teacher_vocabulary(0)


@torch.no_grad()
def teacher_pass(plan: Plan) -> int:
    """Bytes at the peak of the teacher's largest pass, on top of its weights."""
    passes, model = plan.teacher_passes, plan.module.teacher.model
    rows = plan.experience(passes.rows[0], passes.shares)
    with LiveBytes(model_tensors(plan.module.student, *(t.model for t in plan.models.teachers))) as live, _few_blocks():
        model.token_logprobs(
            rows.input_ids,
            rows.response_mask,
            rows.temperature,
            return_hidden=keeps_hidden(plan),
            shared=shared(rows, passes.shares),
        )
    return live.peak


def update(plan: Plan) -> UpdateBytes:
    """Bytes of the largest micro-batch and of the optimizer."""
    module, passes = plan.module, plan.student_passes
    rows = plan.experience(passes.rows[0], passes.shares)
    held = model_tensors(module.student, *(teacher.model for teacher in plan.models.teachers))
    if keeps_hidden(plan):
        head = module.teacher.head().weight
        rows.teacher_hidden = fake((*rows.input_ids.shape, head.shape[1]), head.dtype, head)
        held.append(rows.teacher_hidden)
    module.student.train()
    trained = [parameter for parameter in module.student.parameters() if parameter.requires_grad]
    is_one = len(passes.rows) <= plan.updates // module.epochs_per_rollout
    if not is_one:
        for parameter in trained:
            parameter.grad = fake(parameter.shape, parameter.dtype, parameter)
            held.append(parameter.grad)
    with LiveBytes(held) as live, plan.precision(), _few_blocks():
        module.loss(rows, 0).loss.backward()
    for parameter in trained:
        parameter.grad = None
    return UpdateBytes(nbytes(trained), live.peak, *_optimizer(plan), is_one)


@contextmanager
def _few_blocks() -> Iterator[None]:
    """Inside, the head stops after three blocks of words: the others would take the same space, one by one."""
    whole = _Blocks.__iter__
    setattr(_Blocks, "__iter__", lambda blocks: islice(whole(blocks), 3))  # noqa: B010 - a method of a class
    try:
        yield
    finally:
        setattr(_Blocks, "__iter__", whole)  # noqa: B010


def _optimizer(plan: Plan) -> tuple[int, int]:
    """Bytes of the optimizer's state, and of what its step makes for the moment."""
    student = plan.models.at_rest  # whose dtype the optimizer sees
    optimizer = make_optimizer(plan.module.make_optimizer, student)
    for group in optimizer.param_groups:
        if not plan.is_cpu and not group.get("fused") and group.get("foreach", 0) is None:
            group["foreach"] = True  # PyTorch's choice on a GPU, which a tensor without numbers does not stand on
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = fake(parameter.shape, parameter.dtype, parameter)
    with LiveBytes([*model_tensors(student), *(parameter.grad for parameter in trained)]) as live:
        try:
            optimizer.step()
        except Exception:  # native code that wants numbers, as of bitsandbytes
            return _measured_state(plan), 0
        finally:
            for parameter in trained:
                parameter.grad = None
        return live.now, live.peak - live.now


def _measured_state(plan: Plan) -> int:
    """State per weight of one real matrix, times the weights."""
    matrix = torch.nn.Parameter(torch.ones(256, 256))
    matrix.grad = torch.ones_like(matrix)
    optimizer = plan.module.make_optimizer([matrix])
    optimizer.step()
    # code books ("qmap") are the same for all weights
    own = [value for name, value in optimizer.state[matrix].items() if torch.is_tensor(value) and "qmap" not in name]
    weights = sum(parameter.numel() for parameter in plan.models.at_rest.parameters() if parameter.requires_grad)
    return round(nbytes(own) / matrix.numel() * weights)
