"""The reference of ReferenceKL in a run: what it says, that nothing trains it, when it changes, what is saved of it."""

from __future__ import annotations

import pytest
import torch
from tiny_run import fit, make_data, make_module, weights_of

from kdrl_pl.experience import Experience
from kdrl_pl.losses import ReferenceKL
from kdrl_pl.schedules import Switch


def hand_made() -> Experience:
    words = [[4, 5, 6], [7], [8, 9], [4, 4, 4]]
    return Experience.from_rows([[5, 6]] * 2 + [[8]] * 2, words, [1.0, 0.0, 0.0, 0.0], [0, 0, 1, 1])


def test_the_starting_student_is_its_own_reference(tiny_models) -> None:
    # Red: another model's log-probs, another alignment, or a temperature left out.
    module = make_module(tiny_models[0], None, terms={"reference": ReferenceKL(1.0)}).load()
    e = hand_made()
    e.temperature = 0.7
    module.score(e)
    assert torch.equal(e.reference_logprobs, module.student_logprobs(e))
    assert module.objective.active(e, 0).all()  # rows of equal rewards are pulled to the reference too
    output = module.loss(e)
    assert output.parts["reference"].item() == pytest.approx(0.0, abs=1e-6)
    assert output.metrics["reference/kl"][0].item() == pytest.approx(0.0, abs=1e-5)


def test_a_coefficient_of_zero_asks_nobody(tiny_models) -> None:
    module = make_module(tiny_models[0], None, terms={"reference": ReferenceKL(Switch(0.0, 1.0, 3))}).load()
    e = module.score(hand_made(), rollout=2)
    assert e.reference_logprobs is None
    assert "reference/kl" not in module.loss(e, rollout=2).metrics
    assert module.score(e, rollout=3).reference_logprobs is not None


def run(folder, student: str, rollouts: int, **settings):
    module = make_module(student, None, terms={"reference": ReferenceKL(0.5, **settings)})
    return module, fit(folder, module, make_data(val=0), max_rollouts=rollouts)


def test_the_reference_is_frozen_between_resets(tiny_models, tmp_path) -> None:
    # Red: the reference among the trained weights, shared storage with the student, or a reset one rollout off.
    module, trainer = run(tmp_path / "a", tiny_models[0], 3, reset_every=2)
    after_two, _ = run(tmp_path / "b", tiny_models[0], 2)
    reference = {f"student.{name}": value for name, value in module.reference.model.state_dict().items()}
    student = weights_of(module)
    assert all(torch.equal(reference[name], value) for name, value in weights_of(after_two).items())
    assert any(not torch.equal(reference[name], value) for name, value in student.items())
    assert not any("reference" in name for name in module.state_dict())
    ours = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert ours == {id(p) for p in module.student.parameters()}
    assert not any(id(p) in ours or p.requires_grad for p in module.reference.model.parameters())
    start = make_module(tiny_models[0], None).load()
    never = after_two.reference.model.state_dict()
    assert all(torch.equal(never[name], value) for name, value in start.student.state_dict().items())


@pytest.mark.parametrize("reset_optimizer", [True, False])
def test_the_moments_of_the_optimizer_go_with_the_old_reference(reset_optimizer, tiny_models, tmp_path) -> None:
    _, trainer = run(tmp_path, tiny_models[0], 2, reset_every=2, reset_optimizer=reset_optimizer)
    assert bool(trainer.optimizers[0].state) != reset_optimizer


def test_a_checkpoint_holds_the_reference_only_after_a_reset(tiny_models, tmp_path) -> None:
    # Red: the starting student saved with every checkpoint, a file twice as large for nothing.
    saved = {}
    for rollouts in (1, 2):
        folder = tmp_path / str(rollouts)
        run(folder, tiny_models[0], rollouts, reset_every=2)
        (path,) = (folder / "checkpoints").glob("last-*.ckpt")
        saved[rollouts] = torch.load(path, weights_only=True)
    assert saved[1]["kdrl"]["reference"] is None
    reference = saved[2]["kdrl"]["reference"]
    assert all(torch.equal(reference[name.removeprefix("student.")], x) for name, x in saved[2]["state_dict"].items())
