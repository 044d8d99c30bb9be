"""Training with the student cut over two processes (FSDP2), and its checkpoints: one process is the measure.

Run as a script, this file is one process of the two-process runs: `test_fsdp2.py STUDENT TEACHER FOLDER STRATEGY`.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import fit, make_data, make_module, make_rollouts, make_trainer, metrics_rows

from kdrl_pl.checkpoint import Checkpoints, find_checkpoint
from kdrl_pl.cli.export import main as export
from kdrl_pl.fsdp2 import FSDP2Strategy
from kdrl_pl.losses import Distillation, ReferenceKL
from kdrl_pl.parallel import rank
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.sampler_check import LIMITS
from kdrl_pl.shards import read_checkpoint, whole

ROOT = Path(__file__).parents[1]
QUICK = tuple(str(ROOT / "checkpoints/testbeds/arithmetic" / name) for name in ("student", "teacher"))
ROLLOUTS, STOP = 5, 2


class Uneven(InProcessEngine):
    """Rank 0 decodes up to 40 tokens where rank 1 decodes one."""

    def generate(self, prompts, group_size, sampling, keys, should_stop=None):
        sampling = dataclasses.replace(sampling, max_tokens=1 if rank() else 40)
        return super().generate(prompts, group_size, sampling, keys, should_stop)


def small_steps(params):
    return torch.optim.AdamW(params, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


VARIANTS = {  # settings of the module, of the rollouts, of the trainer
    "activations recomputed": ({"gradient_checkpointing": True}, {}, {}),
    "layers kept": ({}, {}, {"strategy": lambda: FSDP2Strategy(reshard_after_forward=False)}),
    "fused optimizer": ({"optimizer": small_steps}, {}, {}),
    "bfloat16": ({}, {}, {"precision": "bf16-mixed"}),
    "sampled in bfloat16": ({"importance_cap": 2.0}, {"engine": lambda: InProcessEngine(dtype="bfloat16")}, {}),
    "unequal lengths": ({"normaliser": "token"}, {"engine": Uneven}, {}),
}


def steady(params):
    """Where a gradient is nearly 0, Adam without a large eps makes a step of its rounding."""
    return torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.99), eps=1e-4, weight_decay=0.01)


def joint(models):
    """A reference, reset after two rollouts: then the optimizer has no state, and there are weights of it to save."""
    reference = ReferenceKL(coef=0.5, reset_every=2)
    return make_module(*models, optimizer=steady, max_tokens_per_micro_batch=80, terms={"reference": reference})


def variant(folder, models, name, **trainer):
    settings, rollouts, more = VARIANTS[name]
    made = {key: value() if callable(value) else value for key, value in rollouts.items()}
    more = (
        {key: value() if callable(value) else value for key, value in more.items()}
        if trainer
        else {key: value for key, value in more.items() if key != "strategy"}
    )
    module = make_module(*models, max_tokens_per_micro_batch=80, **settings)
    fit(folder / name, module, max_rollouts=2, rollouts=make_rollouts(**made), **{**trainer, **more})
    return module


def quick(folder, **trainer):
    """Five rollouts of the quick start's models."""
    module = make_module(
        *QUICK, distillation=Distillation(coef=0.3, estimator="full"), optimizer=small_steps, normaliser="token"
    )
    fit(folder / "quick", module, make_data(val=0), max_rollouts=5, rollouts=make_rollouts(max_tokens=40), **trainer)


def resumed(folder, models, resume, sharded=False, **trainer):
    """A run of `ROLLOUTS` rollouts that goes on from a checkpoint, or begins."""
    module, keeper = joint(models), Checkpoints(every_n_rollouts=STOP, sharded=sharded)
    rollouts = ROLLOUTS if resume else STOP
    made = fit(
        folder, module, max_rollouts=rollouts, checkpoints=keeper, resume=resume, val_check_interval=2, **trainer
    )
    made.strategy.barrier()
    return module


def main(student, teacher, folder, strategy):
    torch.set_num_threads(1)
    models, folder, two = (student, teacher), Path(folder), {"strategy": strategy, "devices": 2}
    quick(folder, **two)
    if strategy == "ddp":
        return
    fit(folder / "whole", joint(models), max_rollouts=ROLLOUTS, val_check_interval=2, **two)
    for kind in ("full", "sharded"):
        resumed(folder / kind, models, None, kind == "sharded", **two)
        if rank() == 0:
            shutil.copytree(folder / kind, folder / f"{kind} stopped")
        torch.distributed.barrier()
        resumed(folder / kind, models, find_checkpoint(folder / kind), kind == "sharded", **two)
    resumed(folder / "from one process", models, find_checkpoint(folder / "one"), **two)
    for name in VARIANTS:
        module = variant(folder, models, name, **two)
        assert all(weight.dtype == torch.float32 for weight in module.student.parameters())
    validated = joint(models)
    trainer = make_trainer(folder / "validated", **two)
    trainer.validate(validated, make_data(), ckpt_path=find_checkpoint(folder / "sharded"), verbose=False)


def start(models, folder, strategy):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *models, str(folder), strategy]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]


@pytest.fixture(scope="module")
def one(tiny_models, tmp_path_factory):
    """Folder of the one-process runs."""
    folder = tmp_path_factory.mktemp("one")
    quick(folder)
    fit(folder / "whole", joint(tiny_models), max_rollouts=ROLLOUTS, val_check_interval=2)
    resumed(folder / "stopped", tiny_models, None)
    for name in VARIANTS:
        if name != "unequal lengths":
            variant(folder, tiny_models, name)
    return folder


@pytest.fixture(scope="module")
def two(one, tiny_models, tmp_path_factory):
    """Folder of the runs of two processes under FSDP2."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(one / "stopped", folder / "one")
    start(tiny_models, folder, "fsdp2")
    return folder


@pytest.fixture(scope="module")
def ddp(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    start(tiny_models, folder, "ddp")
    return folder


def losses(folder):
    return [row["train/loss"] for row in metrics_rows(folder) if "train/loss" in row]


def sampled(folder):
    """rollout -> ids of every response, in an order that does not depend on the number of processes."""
    found = {}
    for path in sorted((folder / "rollouts").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(path.name[:6], []).append((row["prompt_ids"], row["response_ids"]))
    return {rollout: sorted(rows) for rollout, rows in found.items()}


def end_of(folder):
    return whole(read_checkpoint(find_checkpoint(folder)))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.distributed
@pytest.mark.parametrize("processes", ["ddp", "two"])
def test_two_processes_sample_and_lose_what_one_does(processes, one, request):
    folder = request.getfixturevalue(processes)
    assert len(losses(one / "quick")) == 5
    assert losses(folder / "quick") == pytest.approx(losses(one / "quick"), rel=1e-5)
    ours, theirs = sampled(one / "quick"), sampled(folder / "quick")
    assert list(ours) == [f"{rollout:06d}" for rollout in range(5)] and all(len(rows) == 16 for rows in ours.values())
    assert theirs == ours


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in VARIANTS if "bfloat16" not in name and name != "unequal lengths"])
def test_variants_train_as_one_process_does(name, one, two):
    assert len(losses(one / name)) == 2
    assert losses(two / name) == pytest.approx(losses(one / name), rel=1e-5)
    assert sampled(two / name) == sampled(one / name)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in VARIANTS if "bfloat16" in name])
def test_in_bfloat16_sampler_and_trainer_agree(name, one, two):
    """Other samples than one process's (whose hidden states are fp32 between layers): the same policy to a rounding."""
    for folder in (one, two):
        first, second = [row for row in metrics_rows(folder / name) if "train/loss" in row]
        for row in (first, second):
            assert 1e-5 < row["rollout/sampler_drift_mean"] < LIMITS["bfloat16"][0]
        assert first["train/loss"] == pytest.approx(losses(one / name)[0], abs=0.02)


@pytest.mark.distributed
def test_ranks_of_unequal_work_wait_for_each_other(two):
    lengths = [
        {len(json.loads(line)["response_ids"]) for line in (two / "unequal lengths/rollouts" / name).open()}
        for name in ("000000.jsonl", "000000-rank1.jsonl")
    ]
    assert max(lengths[0]) > 20 and lengths[1] == {1}
    assert len(losses(two / "unequal lengths")) == 2


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_resumed_run_is_bit_equal(kind, two):
    """Weights, optimizer, reference, counters, metrics and rollouts; stopped right after the optimizer was reset."""
    stopped = end_of(two / f"{kind} stopped")
    assert stopped["kdrl"]["rollouts_done"] == STOP and stopped["optimizer_states"][0]["state"] == {}
    expected, found = end_of(two / "whole"), end_of(two / kind)
    for part in ("state_dict", "optimizer_states", "kdrl", "global_step"):
        assert equal(found[part], expected[part]), part
    assert metrics_rows(two / kind) == metrics_rows(two / "whole")
    assert sampled(two / kind) == sampled(two / "whole")
    suffix = ".sharded.ckpt" if kind == "sharded" else ".ckpt"
    kept, of_whole = ({path.name for path in (two / name / "checkpoints").glob("*.ckpt")} for name in (kind, "whole"))
    assert kept == {name.replace(".ckpt", suffix) for name in of_whole}  # the last and the best, nothing of the stop
    assert f"last-000005{suffix}" in kept and len(kept) == 2


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_one_process_goes_on_from_two(kind, one, two, tiny_models, tmp_path):
    shutil.copytree(two / f"{kind} stopped", tmp_path / "run")
    resumed(tmp_path / "run", tiny_models, find_checkpoint(tmp_path / "run"))
    assert losses(tmp_path / "run") == pytest.approx(losses(one / "whole"), rel=1e-5)
    assert sampled(tmp_path / "run") == sampled(one / "whole")
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("last*.ckpt")] == ["last-000005.ckpt"]


@pytest.mark.distributed
def test_two_processes_go_on_from_one(one, two):
    assert losses(two / "from one process") == pytest.approx(losses(one / "whole")[STOP:], rel=1e-5)
    expected, found = end_of(one / "whole"), end_of(two / "from one process")
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=0, atol=1e-5)
    for number, values in expected["optimizer_states"][0]["state"].items():
        torch.testing.assert_close(found["optimizer_states"][0]["state"][number], values, rtol=1e-3, atol=1e-6)


@pytest.mark.distributed
def test_checkpoints_hold_the_student_and_nothing_of_the_teacher(one, two):
    expected = end_of(one / "whole")
    for kind in ("full", "sharded"):
        found = end_of(two / kind)
        assert found.keys() == expected.keys()
        shapes = {name: value.shape for name, value in expected["state_dict"].items()}
        assert {name: value.shape for name, value in found["state_dict"].items()} == shapes
        assert all(name.startswith("student.") for name in shapes)
    folder = find_checkpoint(two / "sharded")
    parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*rank*.pt"))]
    sizes = [sum(rows.numel() for _, rows in part.values()) for part in parts]
    students = sum(value.numel() for value in expected["state_dict"].values())
    assert len(parts) == 2 and sum(sizes) == 3 * students  # weights and two moments, each once
    assert max(sizes) < 0.51 * sum(sizes)


@pytest.mark.distributed
def test_exports_are_equal(one, two, tiny_models, tmp_path):
    config = f"run: {{name: r}}\nmodel: {{student: {tiny_models[0]}}}\n"
    exported = {}
    for name, run in {"one": one / "whole", "full": two / "full", "sharded": two / "sharded"}.items():
        (run / "config.yaml").write_text(config)
        checkpoint = find_checkpoint(run)
        for given in (run, checkpoint):
            output = tmp_path / f"{name}-{given.name}"
            export("export", [str(given), "--last", "--output", str(output)])
            exported[output.name] = load_file(output / "model.safetensors")
    assert len(exported) == 6
    first = exported["one-whole"]
    for weights in exported.values():
        assert weights.keys() == first.keys()
        for name, value in first.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


@pytest.mark.distributed
def test_a_sharded_checkpoint_validates_everywhere(two, tiny_models, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.validate(joint(tiny_models), make_data(), ckpt_path=find_checkpoint(two / "sharded"), verbose=False)
    ours, theirs = (json.loads((folder / "validation.json").read_text()) for folder in (tmp_path, two / "validated"))
    assert ours["val"] == {name: pytest.approx(value, rel=1e-5) for name, value in theirs["val"].items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
