"""One update has one gradient: however its rows are cut into micro-batches and dealt to processes, through Trainer.fit.

Run as a script, this file is one process of the two-process runs: `test_invariance.py STUDENT TEACHER FOLDER STRATEGY`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tiny_run import EvenSum, fit, make_data, make_module, make_rollouts, metrics_rows, weights_of, whole

from kdrl_pl.checkpoint import find_checkpoint
from kdrl_pl.data.curriculum import Curriculum
from kdrl_pl.losses import GSPO, IBRO, TGPO, DisCO, Distillation, PolicyGradient, ReferenceKL
from kdrl_pl.losses.modulation import TRRD, DistilledRL
from kdrl_pl.losses.weights import NORMALISERS
from kdrl_pl.models.adapters import Lora
from kdrl_pl.module import KDRLModule


class Watched(KDRLModule):
    """Remembers the rows of every forward pass that is trained on."""

    def configure_model(self):
        if self.student is None:
            self.forward_rows = []
            super().configure_model()

    def loss(self, experience, rollout=None):
        self.forward_rows.append(len(experience))
        return super().loss(experience, rollout)


class Double(Watched):
    """The same in float64, the teacher too: in fp32 its log-probs depend a little on the rows beside a row."""

    def setup(self, stage):
        super().setup(stage)
        if self.teacher is not None:
            self.teacher.model.double()
        if self.reference is not None and self.adapter is None:
            self.reference.model.double()

    def configure_model(self):
        if self.student is None:
            super().configure_model()
            self.student.double()


class Gradients(Callback):
    """Keeps the gradient of every update as the optimizer gets it: one vector, float64."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(
            torch.cat([whole(p.grad).double().flatten() for p in module.student.parameters() if p.requires_grad])
        )


def distance(a, b):
    """Relative distance of two vectors."""
    return float((a - b).norm() / b.norm())


def update(folder, models, cls, budget, **settings):
    """Gradient of the first update, and the rows of its forward passes."""
    module, gradients = make_module(*models, cls, max_tokens_per_micro_batch=budget, **settings), Gradients()
    rollouts = make_rollouts(max_tokens=20)
    fit(folder, module, make_data(val=0), max_rollouts=1, rollouts=rollouts, after=[gradients])
    assert module.student.model.lm_head.weight.dtype == (torch.float64 if cls is Double else torch.float32)
    return gradients.seen[0], module.forward_rows


KEPT = Distillation(coef=0.3, mask="response", normaliser="kept")
OBJECTIVES = {
    **{name: {"normaliser": name} for name in NORMALISERS},
    **{f"{name}, kept incorrect responses": {"normaliser": name, "distillation": KEPT} for name in NORMALISERS},
    "full vocabulary": {"distillation": Distillation(coef=0.3, estimator="full")},
    "clipped gradient": {"gradient_clip": 0.1},
    "one ratio per response": {"policy_gradient": GSPO(), "normaliser": "sequence"},
    "all rows of an update at once": {"policy_gradient": None, "terms": {"disco": DisCO()}},
    "groups without signal dropped": {"drop_groups_without_signal": True},
    "several readers of the vocabulary": {
        "distillation": Distillation(coef=0.3, estimator="top_k", top_k=3, mask="response"),
        "terms": {"tgpo": TGPO(0.1), "ibro": IBRO(0.1)},
        "importance_cap": 2.0,
    },
    "modulated, truncated filtered, weighed": {
        "policy_gradient": PolicyGradient(modulation=DistilledRL()),
        "overlong_filter": True,
        "importance_cap": 2.0,
    },
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("cls", "tolerance"), [(Watched, 1e-6), (Double, 1e-12)])
def test_micro_batches_leave_the_gradient_alone(objective, cls, tolerance, tiny_models, tmp_path):
    settings = {"gradient_clip": None, **OBJECTIVES[objective]}
    whole, passes = update(tmp_path / "1", tiny_models, cls, 10_000, **settings)
    assert passes == [16]
    for budget, count in ((300, 2), (52, 8)):
        parts, passes = update(tmp_path / str(budget), tiny_models, cls, budget, **settings)
        assert (len(passes), sum(passes)) == (count, 16)
        assert len(set(passes)) > 1  # ragged
        assert distance(parts, whole) <= tolerance
        assert whole.norm() > 1e-3


class KeepsAll(PolicyGradient):
    def active(self, experience):
        return torch.ones_like(experience.truncated)


@pytest.mark.parametrize(("cls", "tolerance"), [(Watched, 1e-6), (Double, 1e-12)])
def test_rows_without_signal_are_not_run_but_counted(cls, tolerance, tiny_models, tmp_path):
    """GRPO where a group is all wrong: its rows get no forward pass, the others weigh what they weighed."""

    def update_of(name, budget=10_000, **settings):
        module = make_module(tiny_models[0], None, cls, max_tokens_per_micro_batch=budget, **settings)
        gradients = Gradients()
        fit(tmp_path / name, module, make_data(val=0), max_rollouts=1, after=[gradients])
        return gradients.seen[0], module.forward_rows

    all_rows, passes = update_of("all", policy_gradient=KeepsAll(), gradient_clip=None)
    assert passes == [16]
    whole, passes = update_of("whole", gradient_clip=None)
    assert passes == [12]
    parts, passes = update_of("parts", 50, gradient_clip=None)
    assert len(passes) > 3
    assert sum(passes) == 12
    assert distance(whole, all_rows) <= tolerance
    assert distance(parts, all_rows) <= tolerance


class NoInferenceMode(Callback):
    """Fails in any hook under inference mode, whose tensors cannot enter a backward pass."""

    def __init__(self):
        self.hooks = set()
        for hook in dir(Callback):
            if hook.startswith("on_") and "checkpoint" not in hook:
                setattr(self, hook, lambda *arguments, hook=hook, **_: self.check(hook, arguments))

    def check(self, hook, arguments):
        assert not torch.is_inference_mode_enabled(), hook
        self.hooks.add(hook)
        if "batch_end" in hook:
            batch = arguments[3]
            assert not batch.experience.input_ids.is_inference()
            assert not batch.experience.behavior_logprobs.is_inference()


def test_no_hook_runs_under_inference_mode_and_training_goes_on_after_validation(tiny_models, tmp_path):
    module, watch, gradients = make_module(*tiny_models), NoInferenceMode(), Gradients()
    trainer = fit(tmp_path, module, max_rollouts=3, val_check_interval=1, after=[watch, gradients])
    assert {
        "on_sanity_check_end",
        "on_train_batch_start",
        "on_validation_batch_end",
        "on_after_backward",
    } <= watch.hooks
    assert len(gradients.seen) == 3
    trainer.validate(module, datamodule=trainer.datamodule)
    assert all(parameter.requires_grad for parameter in module.student.parameters())


# ---- two processes ---------------------------------------------------------------------------------------------------

ROLLOUTS = 3


def prompts_at(places):
    """uids of the prompts at these places of every rollout; rank 0 of 2 gets the first and third, rank 1 the others."""
    data = make_data()
    data.tokenizer_path = sys.argv[1]
    data.setup("fit")
    rollouts = [data.train_dataloader().batch(k).prompts for k in range(ROLLOUTS)]
    return {prompts[place].uid for prompts in rollouts for place in places}


RUNS = {
    "ragged": {"max_tokens_per_micro_batch": 40},
    "clipped, two updates": {
        "groups_per_update": 2,
        "epochs_per_rollout": 2,
        "gradient_clip": 0.5,
        "max_tokens_per_micro_batch": 60,
    },
    "kept": {"normaliser": "group", "distillation": KEPT},
    "all rows at once, two updates": {
        "policy_gradient": None,
        "terms": {"disco": DisCO(score="ratio")},
        "groups_per_update": 2,
        "epochs_per_rollout": 2,
        "max_tokens_per_micro_batch": 60,
    },
    "full": {"distillation": Distillation(coef=0.3, estimator="full"), "normaliser": "sequence"},
    "reference reset": {
        "terms": {"reference": ReferenceKL(coef=1.0, reset_every=2)},
        "max_tokens_per_micro_batch": 60,
    },
    "adapter": {  # switched off for the reference, and worn as it was
        "adapter": Lora(rank=4, alpha=8.0),
        "terms": {"reference": ReferenceKL(coef=1.0, reset_every=2)},
        "max_tokens_per_micro_batch": 60,
    },
    "single precision": {},
    "curriculum": {"curriculum": Curriculum(smoothing=1.0)},
    "dropped, modulated": {
        "policy_gradient": PolicyGradient(modulation=TRRD()),
        "drop_groups_without_signal": True,
        "overlong_filter": True,
        "max_tokens_per_micro_batch": 60,
    },
    # GRPO; the prompts at the other places are all wrong, so their rows need no forward pass
    "nothing for rank 1": {"judged": (0, 2), "max_tokens_per_micro_batch": 60},
    "fewer passes for rank 1": {"judged": (0, 1, 2), "max_tokens_per_micro_batch": 40},
}


SHARDED = [
    name for name in RUNS if name not in ("kept", "curriculum", "dropped, modulated", "single precision", "adapter")
]


def run_all(student: str, teacher: str, folder: Path, names=RUNS, **trainer) -> None:
    """Every run of RUNS; rank 0 writes what came of it."""
    for name in names:
        settings = dict(RUNS[name])
        judged = settings.pop("judged", None)
        data = make_data(curriculum=settings.pop("curriculum", None))
        cls = Watched if name == "single precision" else Double
        module = make_module(student, None if judged else teacher, cls, **settings)
        gradients, reward = Gradients(), EvenSum(prompts_at(judged) if judged else None)
        target = folder / name
        made = fit(
            target,
            module,
            data,
            max_rollouts=ROLLOUTS,
            val_check_interval=2,
            rollouts=make_rollouts(reward=reward),
            after=[gradients],
            **trainer,
        )
        weights = weights_of(module)
        if made.is_global_zero:
            (target / "rows.json").write_text(json.dumps(module.forward_rows))
            torch.save({"gradients": gradients.seen, "weights": weights}, target / "end.pt")


def resume_one(student: str, teacher: str, folder: Path, **trainer) -> None:
    """The first of RUNS stopped after two rollouts and resumed."""
    for rollouts in (2, ROLLOUTS):
        module = make_module(student, teacher, Double, **RUNS["ragged"])
        resume = find_checkpoint(folder / "resumed") if rollouts == ROLLOUTS else None
        made = fit(folder / "resumed", module, max_rollouts=rollouts, val_check_interval=2, resume=resume, **trainer)
        made.strategy.barrier()
    weights = weights_of(module)
    if made.is_global_zero:
        torch.save(weights, folder / "resumed" / "end.pt")


@pytest.fixture(scope="module")
def one_and_two(one, tiny_models, tmp_path_factory):
    """Of a strategy: folders of the same runs on one process and on two, which do them all when first asked."""
    made = {}

    def folders(strategy):
        if strategy not in made:
            folder = tmp_path_factory.mktemp(strategy)
            root = str(Path(__file__).parents[1])
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "KDRL_TEST_RANKS": "2", "PYTHONPATH": root}
            command = [sys.executable, __file__, *tiny_models, str(folder), strategy]
            process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert process.returncode == 0, process.stderr[-4000:]
            made[strategy] = folder
        return one, made[strategy]

    return folders


@pytest.fixture(scope="module")
def one(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("process")
    sys_argv, sys.argv = sys.argv, [__file__, *tiny_models]
    try:
        run_all(*tiny_models, folder)
    finally:
        sys.argv = sys_argv
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "name"), [*(("ddp", name) for name in RUNS), *(("fsdp2", name) for name in SHARDED)]
)
def test_two_processes_train_as_one(strategy, name, one_and_two):
    folders = one_and_two(strategy)
    one, two = (torch.load(folder / name / "end.pt", weights_only=True) for folder in folders)
    updates = ROLLOUTS * (4 if "two updates" in name else 1)
    assert len(one["gradients"]) == len(two["gradients"]) == updates
    single = name == "single precision"
    assert distance(two["gradients"][0], one["gradients"][0]) <= (1e-6 if single else 1e-12)
    assert one["gradients"][0].norm() > 1e-3
    for weight, expected in zip(two["weights"].values(), one["weights"].values(), strict=True):
        assert torch.allclose(weight, expected, rtol=0, atol=1e-4 if single else 1e-10)

    rows = [metrics_rows(folder / name) for folder in folders]
    assert len(rows[0]) == len(rows[1]) == ROLLOUTS + 2
    for first, second in zip(*rows, strict=True):
        assert second.keys() == first.keys()
        wrong = {key: (first[key], second[key]) for key in first if second[key] != pytest.approx(first[key], abs=1e-5)}
        assert not {key: pair for key, pair in wrong.items() if "sampler_drift" not in key}


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_rows_of_no_use_are_not_run_on_any_rank(strategy, one_and_two):
    folders = one_and_two(strategy)
    one, two = (json.loads((folder / "nothing for rank 1" / "rows.json").read_text()) for folder in folders)
    assert one == two  # rank 0 ran all the rows there were to run


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_resume_bit_for_bit(strategy, one_and_two):
    folder = one_and_two(strategy)[1]
    expected = torch.load(folder / "ragged" / "end.pt", weights_only=True)["weights"]
    resumed = torch.load(folder / "resumed" / "end.pt", weights_only=True)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert metrics_rows(folder / "resumed") == metrics_rows(folder / "ragged")


if __name__ == "__main__":
    torch.set_num_threads(1)
    student, teacher, to, how = sys.argv[1:]
    processes = {"strategy": how, "devices": int(os.environ["KDRL_TEST_RANKS"])}
    run_all(student, teacher, Path(to), SHARDED if how == "fsdp2" else RUNS, **processes)
    resume_one(student, teacher, Path(to), **processes)
