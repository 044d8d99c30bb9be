"""Whatever holds the teacher: a run leaves its weights as they were, and its checkpoints hold none of them."""

import hashlib

import pytest
import torch
from tiny_run import fit, make_module, make_rollouts, metrics_rows

from kdrl_pl.checkpoint import Checkpoints
from kdrl_pl.teacher import FrozenTeacher, RoutedTeacher, TeacherCache

KINDS = {
    "fp32": lambda path, _: FrozenTeacher(path),
    "bf16": lambda path, _: FrozenTeacher(path, dtype="bfloat16"),
    "8bit": lambda path, _: FrozenTeacher(path, quantization="8bit"),
    "4bit": lambda path, _: FrozenTeacher(path, quantization="4bit"),
    "offloaded": lambda path, _: FrozenTeacher(path, offload=True),
    "offloaded 8bit": lambda path, _: FrozenTeacher(path, quantization="8bit", offload=True),
    "offloaded 4bit": lambda path, _: FrozenTeacher(path, quantization="4bit", offload=True),
    "sharded": lambda path, _: FrozenTeacher(path, sharded=True),
    "cached": lambda path, folder: FrozenTeacher(path, cache=TeacherCache(str(folder))),
    "routed": lambda path, _: RoutedTeacher({"a": FrozenTeacher(path), "b": FrozenTeacher(path, "bfloat16")}, "a"),
}


def parts(teacher):
    """The teachers that a teacher is made of."""
    return list(teacher.teachers.values()) if isinstance(teacher, RoutedTeacher) else [teacher]


def digest(teacher):
    """Of every parameter and buffer, in whatever form it is stored."""
    found = hashlib.blake2b()
    for part in parts(teacher):
        part.sampler()
        for name, tensor in [*part.model.named_parameters(), *part.model.named_buffers()]:
            found.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def tensors(node):
    """Every tensor of a checkpoint, however deep."""
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from tensors(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from tensors(value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_moves_the_student_alone_and_saves_the_student_alone(kind, tiny_models, tmp_path):
    module = make_module(*tiny_models)
    module.teacher = KINDS[kind](tiny_models[1], tmp_path / "cache")
    module.teacher.load("cpu")
    before = digest(module.teacher)
    student = [parameter.detach().clone() for parameter in module.load().student.parameters()]
    fit(tmp_path, module, max_rollouts=2, rollouts=make_rollouts(), checkpoints=Checkpoints(every_n_rollouts=1))
    assert digest(module.teacher) == before
    assert not any(torch.equal(*pair) for pair in zip(student, module.student.parameters(), strict=True))
    for part in parts(module.teacher):
        assert not any(parameter.requires_grad for parameter in part.model.parameters())
        assert not any(layer.training for layer in part.model.modules())
    assert len([row for row in metrics_rows(tmp_path) if row.get("teacher/reverse_kl") is not None]) == 2

    files = list(tmp_path.rglob("*.ckpt"))
    theirs = {tuple(p.shape) for part in parts(module.teacher) for p in part.model.parameters()}
    assert files and theirs
    ours = sum(parameter.numel() for parameter in module.student.parameters())
    for file in files:
        saved = torch.load(file, weights_only=True)
        assert saved["state_dict"].keys() == {f"student.{name}" for name in module.student.state_dict()}
        assert sum(tensor.numel() for tensor in tensors(saved)) < 3 * ours + 1000  # weights and two moments of AdamW
        assert saved["kdrl"]["teacher"] == module.teacher.fingerprint()
