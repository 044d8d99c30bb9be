"""BaseTeacher: the student's own base as its teacher, by the adapter being off."""

import pytest
import torch
from tiny_run import fit, make_data, make_module, make_rollouts, metrics_rows, rollout_files, weights_of

from kdrl_pl import Experience, FrozenTeacher, KDRLModule
from kdrl_pl.losses import Distillation
from kdrl_pl.models.adapters import Lora, adapter_weights
from kdrl_pl.rollout.callback import RolloutCallback
from kdrl_pl.teacher import BaseTeacher


def lora(**settings) -> Lora:
    return Lora(**{"rank": 4, "alpha": 8.0, **settings})


def rows() -> Experience:
    words = [[4, 5, 6], [7], [8, 9], [4, 4, 4]]
    return Experience.from_rows([[5, 6]] * 2 + [[8]] * 2, words, [1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1])


@pytest.mark.parametrize("estimator", ["k2", "full"])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_it_says_what_a_second_copy_of_the_starting_student_says(estimator, modules_to_save, tiny_models):
    # Red: the adapter left on, or its head; a student left without it.
    outputs = []
    for teacher in (BaseTeacher(), FrozenTeacher(tiny_models[0])):
        module = KDRLModule(
            tiny_models[0],
            teacher,
            lora(modules_to_save=modules_to_save),
            distillation=Distillation(coef=0.5, estimator=estimator),
        ).load()
        for number, weight in enumerate(adapter_weights(module).values()):
            weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        experience = module.score(rows(), rollout=0)
        output = module.loss(experience, rollout=0)
        output.loss.backward()
        outputs.append((experience.teacher_logprobs, output.parts["kd"], module.student_logprobs(experience)))
        outputs[-1] += tuple(weight.grad for weight in adapter_weights(module).values())
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)
    assert (outputs[0][0] - outputs[0][2]).abs().max() > 0.01  # teacher and student differ


def test_a_run_under_it_is_that_under_a_copy(tiny_models, tmp_path):
    runs = {}
    for name, teacher in (("base", BaseTeacher()), ("copy", FrozenTeacher(tiny_models[0]))):
        module = make_module(tiny_models[0], tiny_models[0], adapter=lora())
        module.teacher = teacher
        fit(tmp_path / name, module, make_data(), max_rollouts=3)
        runs[name] = (metrics_rows(tmp_path / name), rollout_files(tmp_path / name), weights_of(module))
        assert any(row.get("val/val/kl_teacher", 0) > 0 for row in runs[name][0])
    assert runs["base"][:2] == runs["copy"][:2]
    assert all(torch.equal(weight, runs["copy"][2][name]) for name, weight in runs["base"][2].items())


def test_it_needs_an_adapter(tiny_models):
    with pytest.raises(ValueError, match=r"BaseTeacher is the student without its adapter, and there is none; set"):
        KDRLModule(tiny_models[0], BaseTeacher())


def test_it_does_not_answer_prompts(tiny_models, tmp_path):
    module = KDRLModule(tiny_models[0], BaseTeacher(), lora())
    rollouts = make_rollouts(policy="teacher")
    assert isinstance(rollouts, RolloutCallback)
    with pytest.raises(ValueError, match=r"can only be scored; to sample from the base .* kdrl validate without"):
        fit(tmp_path, module, make_data(), max_rollouts=1, rollouts=rollouts)
