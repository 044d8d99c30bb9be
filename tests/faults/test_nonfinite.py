"""A number that is not finite costs a step, on every rank, and its rollout is kept; too many of them end the run."""

import sys
from pathlib import Path

import pytest
import torch
from injectors import NaNStudent, run_script
from lightning.pytorch import Callback
from tiny_run import EvenSum, fit, make_module, make_rollouts, metrics_rows, weights_of

from kdrl_pl.checkpoint import Checkpoints, find_checkpoint
from kdrl_pl.errors import RunError
from kdrl_pl.experience import Experience
from kdrl_pl.records import NonFiniteRollouts

pytestmark = pytest.mark.faults


class Steps(Callback):
    """Weights after each rollout, and the rollouts in which the optimizer was called."""

    def __init__(self):
        self.weights, self.called = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.called.append(module.rollouts_done)

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append(weights_of(module))


def student(models, bad, rank=0, **settings):
    module = make_module(*models, NaNStudent, **settings)
    module.bad, module.rank = bad, rank
    return module


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("fault", ["logprobs", "loss", "gradient"])
def test_the_step_is_not_taken_but_counted_and_the_rollout_is_kept(fault, tiny_models, tmp_path):
    module, steps = student(tiny_models, {1: fault}), Steps()
    fit(tmp_path, module, max_rollouts=3, after=[steps])
    assert steps.called == [0, 2]
    assert same(steps.weights[0], steps.weights[1])
    assert not same(steps.weights[1], steps.weights[2])
    rows = [row for row in metrics_rows(tmp_path) if "validation" not in row]
    assert [row["train/skipped_steps"] for row in rows] == [0.0, 1.0, 1.0]
    assert [path.name for path in (tmp_path / "nonfinite").iterdir()] == ["rollout-000001.pt"]
    kept = Experience.load(tmp_path / "nonfinite" / "rollout-000001.pt")
    assert len(kept) == 16
    replay = student(tiny_models, {1: fault}).load()
    replay.load_state_dict(steps.weights[0])
    again = replay.loss(kept, 1)
    again.loss.backward()
    gradient = replay.student.model.lm_head.weight.grad
    shown = {"logprobs": again.logprobs, "loss": again.loss, "gradient": gradient}
    assert {name: bool(value.isfinite().all()) for name, value in shown.items() if name == fault} == {fault: False}


def test_a_nan_of_the_teacher_is_one_of_the_loss(tiny_models, tmp_path):
    module, steps = make_module(*tiny_models, max_skipped_steps=3), Steps()
    score = module.teacher.score

    def spoiled(experience, *arguments, **more):
        score(experience, *arguments, **more)
        if module.rollouts_done == 1 and module.trainer.training:
            experience.teacher_logprobs[0, experience.response_mask[0].nonzero()[0]] = torch.nan

    module.teacher.score = spoiled
    fit(tmp_path, module, max_rollouts=3, after=[steps])
    assert steps.called == [0, 2]
    assert module.skipped_steps == 1


def test_the_run_ends_after_n_in_a_row_with_the_last_good_checkpoint_untouched(tiny_models, tmp_path):
    module = student(tiny_models, dict.fromkeys((3, 4, 5, 6), "gradient"), max_skipped_steps=3)
    steps = Steps()
    with pytest.raises(RunError, match=r"3 steps in a row had a loss, .* not finite \(last: rollout 5\)"):
        fit(tmp_path, module, max_rollouts=9, after=[steps], checkpoints=Checkpoints(every_n_rollouts=3))
    good = find_checkpoint(tmp_path)
    assert good.name == "last-000003.ckpt"
    assert same(torch.load(good, weights_only=True)["state_dict"], steps.weights[2])
    assert same(weights_of(module), steps.weights[2])
    assert sorted(path.name[8:14] for path in (tmp_path / "nonfinite").iterdir()) == ["000003", "000004", "000005"]


def test_a_step_without_signal_does_not_begin_the_count_anew(tiny_models, tmp_path):
    """GRPO on a reward that says the same of all in every second rollout."""

    class Sometimes(EvenSum):
        calls = -2  # the validation before training has two batches

        def __call__(self, completions):
            output, self.calls = super().__call__(completions), self.calls + 1
            if self.calls > 0 and self.calls % 2 == 0:
                output.values = [0.0] * len(completions)
            return output

    bad = {0: "gradient", 2: "gradient", 4: "gradient"}
    module = student((tiny_models[0], None), bad, max_skipped_steps=3)
    with pytest.raises(RunError, match=r"3 steps in a row .* \(last: rollout 4\)"):
        fit(tmp_path, module, max_rollouts=9, val_check_interval=100, rollouts=make_rollouts(reward=Sometimes()))
    assert module.skipped_steps == 5


def test_only_the_newest_are_kept_of_each_rank(tmp_path):
    rows = Experience.from_rows([[1]], [[2]], [0.0], [0])
    for rank in (0, 1):
        kept = NonFiniteRollouts(tmp_path, rank, keep=2)
        for rollout in (8, 9, 10, 1_000_000):
            kept.write(rollout, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rollout-000010-rank1.pt",
        "rollout-000010.pt",
        "rollout-1000000-rank1.pt",
        "rollout-1000000.pt",
    ]


def run_two(student_path: str, teacher: str, folder: Path) -> None:
    """One process of two: on rank 1 alone each kind of fault."""
    bad = {0: "logprobs", 1: "loss", 2: "gradient"}
    module, steps = student((student_path, teacher), bad, rank=1), Steps()
    trainer = fit(folder, module, max_rollouts=4, val_check_interval=100, after=[steps], strategy="ddp", devices=2)
    torch.save(
        {"called": steps.called, "skipped": module.skipped_steps, "weights": weights_of(module)},
        folder / f"end-{trainer.global_rank}.pt",
    )


@pytest.mark.distributed
def test_no_rank_steps_when_one_of_them_has_a_nan(tiny_models, tmp_path):
    run_script(__file__, *tiny_models, tmp_path)
    ends = [torch.load(tmp_path / f"end-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [end["called"] for end in ends] == [[3], [3]]
    assert [end["skipped"] for end in ends] == [3, 3]
    assert same(ends[0]["weights"], ends[1]["weights"])
    names = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert names == [f"rollout-00000{k}{rank}.pt" for k in range(3) for rank in ("-rank1", "")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_two(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
