"""Offloaded weights: the same log-probs, and what stands where. The moves themselves need a GPU."""

import pytest
import torch
from contract import AND_BF16, rows
from torch import nn

from kdrl_pl.losses import Distillation
from kdrl_pl.models.tiny import write_tiny
from kdrl_pl.module import KDRLModule
from kdrl_pl.teacher import FrozenTeacher
from kdrl_pl.teacher import offload as module
from kdrl_pl.teacher.offload import WaitingWeights, pinned


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    write_tiny(folder, 128, 2)
    return str(folder)


def scored(teacher, hidden=False):
    experience = rows(1.0).to(teacher.device)
    teacher.score(experience, experience.response_mask, hidden=hidden)
    return experience


@pytest.mark.parametrize("precision", AND_BF16)
def test_log_probs_head_and_sampler_are_those_of_a_teacher_that_stays(precision, big):
    stays, waits = (FrozenTeacher(big, **AND_BF16[precision], offload=offload) for offload in (False, True))
    for teacher in (stays, waits):
        teacher.load("cpu")
    for _ in range(2):
        assert torch.equal(scored(stays).teacher_logprobs, scored(waits).teacher_logprobs)
    assert torch.equal(scored(stays, True).teacher_hidden, scored(waits, True).teacher_hidden)
    assert torch.equal(stays.head().weight, waits.head().weight)
    ids = rows(1.0).input_ids
    assert torch.equal(*(teacher.sampler().model(ids).logits for teacher in (stays, waits)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("table", torch.ones(5))


def places(model):
    return {name: parameter.device.type for name, parameter in model.named_parameters()}


@pytest.mark.gpu
def test_on_a_gpu_parameters_come_and_go():
    model, x = Two(), torch.randn(6, 3)
    expected = model.head(model.first(x)).detach()
    waiting = WaitingWeights(model, "cuda")
    assert model.table.device.type == "cuda"
    assert set(places(model).values()) == {"cpu"}
    assert all(parameter.is_pinned() for parameter in model.parameters())
    at_home = [parameter.data_ptr() for parameter in model.parameters()]
    waiting.bring()
    assert set(places(model).values()) == {"cuda"}
    assert torch.allclose(model.head(model.first(x.cuda())).cpu(), expected, atol=1e-5)
    waiting.send_away(keep=model.head.parameters())
    assert places(model) == {"first.weight": "cpu", "first.bias": "cpu", "head.weight": "cuda", "head.bias": "cuda"}
    waiting.send_away()
    assert [parameter.data_ptr() for parameter in model.parameters()] == at_home  # not copied back
    waiting.bring(model.head.parameters())
    assert places(model) == {"first.weight": "cpu", "first.bias": "cpu", "head.weight": "cuda", "head.bias": "cuda"}


def test_pinned_copies_share_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4096)
    tensors = [torch.randn(n, dtype=dtype) for n in (5, 700, 3000, 1) for dtype in (torch.float32, torch.bfloat16)]
    tensors.append(torch.arange(200, dtype=torch.uint8).view(10, 20))
    copies = pinned(tensors)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, copies, strict=True))
    assert all(copy.is_pinned() == torch.cuda.is_available() for copy in copies)
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) < len(copies)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", AND_BF16)
def test_on_a_gpu_the_weights_leave_the_device_between_uses(precision, big):
    stays, waits = (FrozenTeacher(big, **AND_BF16[precision], offload=offload) for offload in (False, True))
    for teacher in (stays, waits):
        teacher.load("cuda")

    def on_device():
        return {name for name, parameter in waits.model.named_parameters() if parameter.is_cuda}

    assert on_device() == set()
    assert all(parameter.is_pinned() for parameter in waits.model.parameters())
    scored(stays), scored(waits)  # the first products take memory of cuBLAS's own
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        one, other = scored(stays), scored(waits)
        assert torch.equal(one.teacher_logprobs, other.teacher_logprobs)
        assert one.teacher_logprobs[one.response_mask].std() > 0.01
        del one, other
        assert on_device() == set()
        assert torch.cuda.memory_allocated() <= before + 2**16
    # The forms that read the whole vocabulary need the head in the loss, after the scoring.
    one, other = scored(stays, True), scored(waits, True)
    assert torch.equal(one.teacher_hidden, other.teacher_hidden)
    assert on_device() == {"model.lm_head.weight"}
    assert waits.head().weight.is_cuda and torch.equal(waits.head().weight, stays.head().weight)
    scored(waits)
    assert on_device() == set()
    assert waits.head().weight.is_cuda
    assert on_device() == {"model.lm_head.weight"}
    ids = rows(1.0).input_ids.cuda()
    assert torch.equal(*(teacher.sampler().model(ids).logits for teacher in (stays, waits)))
    scored(waits)
    assert on_device() == set()


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_on_a_gpu_the_gradient_is_that_of_a_teacher_that_stays(estimator, big, tiny_models):
    gradients = []
    for offload in (False, True):
        teacher = FrozenTeacher(big, dtype="bfloat16", offload=offload)
        student = KDRLModule(tiny_models[0], teacher, distillation=Distillation(0.3, estimator)).load("cuda")
        student.loss(student.score(rows(1.0).to("cuda"))).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.student.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)
    assert gradients[0].norm() > 1e-3


@pytest.mark.gpu
def test_bf16_on_the_gpu_is_fp32_on_the_cpu_up_to_its_rounding(big):
    exact, rounded = FrozenTeacher(big), FrozenTeacher(big, dtype="bfloat16")
    exact.load("cpu")
    rounded.load("cuda")
    expected, experience = scored(exact), scored(rounded)
    difference = (experience.teacher_logprobs.cpu() - expected.teacher_logprobs).abs()
    assert 0 < difference.max() < 0.05
