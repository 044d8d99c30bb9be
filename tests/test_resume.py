"""A run stopped at any save point and resumed equals the uninterrupted one, bit for bit, in one process.

The uninterrupted run saves a checkpoint in every hook; each of them is then resumed on its own, in a folder as the run
had left it at that moment (what a kill right after the save leaves behind) or in that of the finished run (a kill later
on, with rows and files to be cut back).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from tiny_run import fit, make_data, make_module, metrics_rows, rollout_files, weights_of

from kdrl_pl.checkpoint import AtomicCheckpointIO, find_checkpoint
from kdrl_pl.cli.lightning import RunCLI
from kdrl_pl.data.curriculum import Curriculum
from kdrl_pl.errors import RunError
from kdrl_pl.listening import KLBudget, PlateauSwitch
from kdrl_pl.losses import Distillation, PolicyGradient, ReferenceKL
from kdrl_pl.models.adapters import Lora
from kdrl_pl.schedules import Cosine, Switch

ROLLOUTS = 5  # of 4 prompts; an epoch has 2


def adamw_8bit(params):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=3e-3, betas=(0.9, 0.99), min_8bit_size=1024)


VARIANTS = {  # made anew for every run: schedules that listen have a state; "curriculum" is the data module's
    "joint": dict,
    "two updates": lambda: {
        "groups_per_update": 2,
        "epochs_per_rollout": 2,
        "lr_schedule": Cosine(1.0, 0.1, ROLLOUTS),
    },
    "hard switch": lambda: {
        "policy_gradient": PolicyGradient(coef=Switch(0.0, 1.0, 3)),
        "distillation": Distillation(coef=Switch(1.0, 0.0, 3)),
    },
    "schedules that listen": lambda: {
        "policy_gradient": PolicyGradient(coef=PlateauSwitch(0.5, 1.0, patience=1, metric="val/val/kl_teacher")),
        "distillation": Distillation(coef=KLBudget(0.3, target=0.1, rate=0.5, low=0.01, high=3.0)),
    },
    "curriculum": lambda: {"curriculum": Curriculum(floor=0.1, smoothing=1.0)},
    "reference": lambda: {"terms": {"reference": ReferenceKL(coef=0.5, reset_every=2)}},
    "adapter": lambda: {
        "adapter": Lora(rank=4, alpha=8.0, modules_to_save=["lm_head"]),
        "terms": {"reference": ReferenceKL(coef=0.5, reset_every=2)},
    },
    "8-bit optimizer": lambda: {"optimizer": adamw_8bit},
}

BEFORE = ("on_train_batch_start",)  # before the rollout
AFTER = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",  # after the rollout, before the update
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)


class SaveEverywhere(Callback):
    """Saves a checkpoint in each of its hooks, beside a copy of the run folder as it is then."""

    def __init__(self, folder: Path, place: str, hooks: tuple[str, ...]) -> None:
        self.folder, self.place, self.saves = folder, place, []
        for hook in hooks:
            setattr(self, hook, lambda trainer, module, *_, hook=hook, **__: self.save(trainer, module, hook))

    def save(self, trainer, module, hook):
        if trainer.sanity_checking:
            return
        point = self.folder / f"{module.rollouts_done} done, {hook} {self.place}, {len(self.saves)}"
        shutil.copytree(trainer.default_root_dir, point, ignore=shutil.ignore_patterns("checkpoints"))
        trainer.save_checkpoint(point / "a.ckpt")
        self.saves.append(point)


def state(folder, module, trainer):
    """Everything that must be equal: weights, optimizer, counters, metrics, prompts, sampled ids, log-probs."""
    return {
        "weights": weights_of(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedules": {name: schedule.state_dict() for name, schedule in module.schedules().items()},
        "counters": (module.rollouts_done, module.sampled_tokens, module.skipped_steps, trainer.global_step),
        "pass rates": trainer.datamodule.state_dict().get("pass_rates"),
        "metrics": metrics_rows(folder),
        "rollouts": rollout_files(folder),
        "summary": {**json.loads((folder / "summary.json").read_text()), "seconds": 0},
    }


def difference(a, b, name=""):
    """The first place where two nested states differ, None where they do not."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((found for k in a if (found := difference(a[k], b[k], f"{name}/{k}"))), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next((found for i, (x, y) in pairs if (found := difference(x, y, f"{name}/{i}"))), None)
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return None if same else f"{name}: {str(a)[:300]} is not {str(b)[:300]}"


def run(folder, models, settings, **trainer):
    settings = settings()
    data = make_data(rows=8, curriculum=settings.pop("curriculum", None))
    module = make_module(*models, **settings)
    return module, fit(folder, module, data, **{"max_rollouts": ROLLOUTS, **trainer})


@pytest.mark.parametrize(
    ("variant", "val_every", "hooks", "done"),
    [
        ("joint", 3, AFTER, (0, 3, 5)),  # validation inside an epoch
        ("joint", 2, ("on_train_batch_end", "on_validation_end", "on_train_epoch_end"), (2, 4)),  # and at its end
        ("two updates", 2, ("on_train_batch_start", "on_train_batch_end", "on_validation_end"), (1, 2)),
        ("hard switch", 3, ("on_train_batch_start", "on_train_batch_end"), (2, 3, 4)),
        ("schedules that listen", 2, ("on_train_batch_start", "on_train_batch_end", "on_validation_end"), (2, 3)),
        ("curriculum", 3, ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"), (0, 2, 3)),
        ("reference", 3, ("on_train_batch_start", "on_train_batch_end"), (2, 3)),  # reset after 2 and after 4
        ("adapter", 3, ("on_train_batch_start", "on_train_batch_end"), (1, 2, 3)),
        ("8-bit optimizer", 3, ("on_train_batch_start", "on_train_batch_end"), (2, 3)),
    ],
)
def test_resumed_runs_equal_the_uninterrupted_one(
    variant, val_every, hooks, done, tiny_models, tmp_path, record_property
):
    settings, folder = VARIANTS[variant], tmp_path / "run"
    first = SaveEverywhere(tmp_path / "points", "first", BEFORE)
    last = SaveEverywhere(tmp_path / "points", "last", hooks)
    saved = run(folder, tiny_models, settings, val_check_interval=val_every, before=[first], after=[last])
    expected = state(folder, *saved)
    if variant == "schedules that listen":  # they have something to forget
        assert [row["train/pg_coef"] for row in expected["metrics"] if "validation" not in row] == [0.5] * 4 + [1.0]
        assert len({row["train/kd_coef"] for row in expected["metrics"] if "validation" not in row}) == ROLLOUTS
    if variant == "8-bit optimizer":
        moments = [state["state1"].dtype for state in saved[1].optimizers[0].state.values()]
        assert {torch.uint8, torch.float32} == set(moments)
    if variant == "curriculum":
        assert len(set(expected["pass rates"].values())) > 2
    plain = tmp_path / "plain"
    assert difference(expected, state(plain, *run(plain, tiny_models, settings, val_check_interval=val_every))) is None

    broken, compared = {}, 0
    points = [point for point in first.saves + last.saves if int(point.name[0]) in done]
    assert {point.name[0] for point in points} == {str(rollouts) for rollouts in done}
    for point in points:
        left_behind = {"stopped at once": point}
        if "on_train_batch" in point.name and "last" in point.name:
            left_behind["stopped later"] = folder
        for when, source in left_behind.items():
            resumed = tmp_path / f"{point.name}, {when}"
            shutil.copytree(source, resumed)
            again, trainer = run(resumed, tiny_models, settings, val_check_interval=val_every, resume=point / "a.ckpt")
            if found := difference(expected, state(resumed, again, trainer)):
                broken[resumed.name] = found
            compared += 1
    record_property("resume points", compared)
    assert not broken, "\n".join(f"{name}: {found}" for name, found in broken.items())


def test_a_longer_run_continues_a_finished_one(tiny_models, tmp_path):
    module, trainer = run(tmp_path / "whole", tiny_models, dict, val_check_interval=3)
    expected = state(tmp_path / "whole", module, trainer)
    run(tmp_path / "parts", tiny_models, dict, val_check_interval=3, max_rollouts=3)  # stops in the middle of an epoch
    checkpoint = find_checkpoint(tmp_path / "parts")
    module, trainer = run(tmp_path / "parts", tiny_models, dict, val_check_interval=3, resume=checkpoint)
    assert difference(expected, state(tmp_path / "parts", module, trainer)) is None


def test_a_finished_run_does_not_train_on(tiny_models, tmp_path):
    folder = tmp_path / "run"
    expected = state(folder, *run(folder, tiny_models, dict, val_check_interval=3))
    resumed = run(folder, tiny_models, dict, val_check_interval=3, resume=find_checkpoint(folder))
    assert difference(expected, state(folder, *resumed)) is None


@pytest.mark.parametrize("make", [torch.optim.AdamW, adamw_8bit], ids=["torch", "bitsandbytes"])
def test_a_run_goes_on_with_the_settings_that_it_is_given(make, tiny_models, tmp_path):
    # Red: the optimizer's settings of the checkpoint, whatever the command line says.
    def slower(params):
        optimizer = make(params)
        optimizer.param_groups[0].update(lr=1e-4, weight_decay=0.5)
        return optimizer

    run(tmp_path, tiny_models, lambda: {"optimizer": make}, max_rollouts=2)
    before = find_checkpoint(tmp_path)
    _, trainer = run(tmp_path, tiny_models, lambda: {"optimizer": slower}, max_rollouts=3, resume=before)
    (group,) = trainer.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0.5)
    first = {"AdamW": 1e-3, "adamw_8bit": 3e-3}[make.__name__]
    rates = [row["train/lr"] for row in metrics_rows(tmp_path) if "validation" not in row]
    assert rates == pytest.approx([first, first, 1e-4])
    steps = [int(state["step"]) for state in trainer.optimizers[0].state.values()]
    assert set(steps) == {3}  # the moments are the saved ones


def test_seconds_of_both_parts_are_counted_once(tiny_models, tmp_path):
    folder = tmp_path / "run"
    started = time.perf_counter()
    run(folder, tiny_models, dict, max_rollouts=2)
    run(folder, tiny_models, dict, max_rollouts=3, resume=find_checkpoint(folder))
    wall = time.perf_counter() - started
    of_rollouts = sum(json.loads(line).get("time/step", 0) for line in (folder / "metrics.jsonl").open())
    assert of_rollouts < json.loads((folder / "summary.json").read_text())["seconds"] < wall


class Steps(DummyLogger):
    """Remembers which rollout Lightning's loggers were told at which step."""

    def __init__(self):
        super().__init__()
        self.tokens = {}

    def log_metrics(self, metrics, step=None):
        if "perf/tokens" in metrics:
            self.tokens.setdefault(step, metrics["perf/tokens"])


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_loggers_go_on_at_the_right_step(hook, tiny_models, tmp_path):
    whole, resumed = Steps(), Steps()
    saver = SaveEverywhere(tmp_path / "points", "last", (hook,))
    run(tmp_path / "a", tiny_models, dict, logger=whole, after=[saver])
    assert list(whole.tokens) == [0, 1, 2, 3, 4]
    (point,) = [point for point in saver.saves if point.name.startswith("3 done")]
    run(tmp_path / "b", tiny_models, dict, logger=resumed, resume=point / "a.ckpt")
    assert resumed.tokens == {step: whole.tokens[step] for step in (3, 4)}


class SaveAfterEveryBackward(Callback):
    def on_after_backward(self, trainer, module):
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt")


def test_no_checkpoint_between_two_updates_of_a_rollout(tiny_models, tmp_path):
    """Its weights would be those of half a rollout, from which no resumed run could go on."""
    with pytest.raises(RunError, match=r"in the middle of the updates of rollout 0; save in on_train_batch_end"):
        run(tmp_path, tiny_models, lambda: {"groups_per_update": 2}, after=[SaveAfterEveryBackward()])
    # before the first update of the rollout the weights are still those of the boundary
    assert torch.load(tmp_path / "0.ckpt", weights_only=True)["kdrl"]["rollouts_done"] == 0
    assert not (tmp_path / "1.ckpt").exists()


def test_a_checkpoint_of_another_teacher_is_refused(tiny_models, tmp_path):
    student, _ = tiny_models
    run(tmp_path / "run", tiny_models, dict, max_rollouts=1)
    with pytest.raises(ValueError, match=r"was trained under teacher [0-9a-f]{16}/float32, this run has [0-9a-f]{16}"):
        run(tmp_path / "run", (student, student), dict, resume=find_checkpoint(tmp_path / "run"))


def test_a_checkpoint_of_another_data_set_is_refused_unless_one_insists(tiny_models, tmp_path, caplog):
    run(tmp_path / "run", tiny_models, dict, max_rollouts=1)
    checkpoint = find_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match=r"was trained on data set [0-9a-f]{32}, this run has [0-9a-f]{32}; use the"):
        fit(tmp_path / "run", make_module(*tiny_models), make_data(rows=10), max_rollouts=2, resume=checkpoint)
    module, data = make_module(*tiny_models), make_data(rows=10)
    data.resume_anyway = True
    fit(tmp_path / "run", module, data, max_rollouts=2, resume=checkpoint)
    assert module.rollouts_done == 2
    assert "resumed anyway, as asked" in caplog.text
    # order, size and validation are no part of it
    data = make_data(rows=10, prompts_per_rollout=2, val=0, seed=3)
    fit(tmp_path / "run", make_module(*tiny_models), data, max_rollouts=3, resume=find_checkpoint(tmp_path / "run"))


def test_a_checkpoint_of_another_tokenizer_is_refused_unless_one_insists(tiny_models, tmp_path):
    student, _ = tiny_models
    run(tmp_path / "run", tiny_models, dict, max_rollouts=1)
    other = shutil.copytree(student, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["1"], words["2"] = words["2"], words["1"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    checkpoint = find_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match=r"was trained with tokenizer [0-9a-f]{16}, this run has [0-9a-f]{16}; use"):
        run(tmp_path / "run", (str(other), None), dict, resume=checkpoint)
    module, data = make_module(str(other), None), make_data(rows=8)
    module.resume_anyway = data.resume_anyway = True
    fit(tmp_path / "run", module, data, max_rollouts=2, resume=checkpoint)
    assert module.rollouts_done == 2


def resolved(resume, root):
    """Folder and checkpoint that `--resume` leads to, of runs named "r" below `root`."""
    cli = RunCLI.__new__(RunCLI)
    cli.resume, cli.subcommand = resume, "fit"
    return cli._resolve({"root": str(root), "name": "r"})


def test_resume_auto_takes_the_newest_run_that_has_a_checkpoint(tmp_path):
    assert resolved("auto", tmp_path)[1] is None
    with pytest.raises(FileNotFoundError, match="--resume must: no run with checkpoints"):
        resolved("must", tmp_path)
    for day in (1, 2):
        AtomicCheckpointIO().save_checkpoint(
            {}, tmp_path / "r" / f"2026-01-0{day}" / "checkpoints" / "last-000003.ckpt"
        )
    killed_in_its_first_save = tmp_path / "r" / "2026-01-03" / "checkpoints"
    killed_in_its_first_save.mkdir(parents=True)
    (killed_in_its_first_save / ".last-000001.ckpt.tmp").write_bytes(b"half")
    newest = tmp_path / "r" / "2026-01-02"
    for word in ("auto", "must"):
        assert resolved(word, tmp_path) == (newest, newest / "checkpoints" / "last-000003.ckpt")
    assert resolved("never", tmp_path)[1] is None
    assert resolved(str(tmp_path / "r" / "2026-01-01"), tmp_path)[0] == tmp_path / "r" / "2026-01-01"


def test_a_checkpoint_that_lies_elsewhere_makes_no_run_folder_of_that_place(tmp_path, monkeypatch):
    # Red: the folder above that of the file taken for the run's: its config.yaml and rollouts/ would be written over.
    copy = tmp_path / "home" / "kept" / "last-000003.ckpt"
    AtomicCheckpointIO().save_checkpoint({}, copy)
    with pytest.raises(ValueError, match=r"last-000003.ckpt lies in no run folder; put it into checkpoints/ of its"):
        resolved(str(copy), tmp_path)
    copy.parent.rename(copy.parent.with_name("checkpoints"))
    monkeypatch.chdir(copy.parent.with_name("checkpoints"))
    assert resolved("last-000003.ckpt", tmp_path)[0] == tmp_path / "home"


QUICK = """
model:
  student: checkpoints/testbeds/arithmetic/student
  teacher: {path: checkpoints/testbeds/arithmetic/teacher}
  normaliser: token
data:
  prompts_per_rollout: 4
  train: {addition: {source: addition, size: 12, options: {digits: 2}}}
  val: {addition: {source: addition, size: 4, options: {digits: 2}}}
rollout:
  reward: {class_path: kdrl_pl.rewards.TaskReward}
  group_size: 4
  validation_samples: 2
  sampling: {max_tokens: 20}
trainer: {accelerator: cpu, val_check_interval: 5}
run: {name: killed, max_rollouts: 9}
checkpoint: {every_n_rollouts: 3}
"""


def kdrl(*arguments, wait=True):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdrl_pl", *map(str, arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if wait:
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 0, errors
    return process


def wait_for(condition, process, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.005)


@pytest.mark.faults
def test_a_killed_command_resumes(tmp_path):
    (tmp_path / "quick.yaml").write_text(QUICK)
    fit_it = ("fit", "--config", tmp_path / "quick.yaml", "--run.root")
    kdrl(*fit_it, tmp_path / "whole")
    process = kdrl(*fit_it, tmp_path / "parts", wait=False)

    def beyond_a_checkpoint():
        files = list((tmp_path / "parts").glob("killed/*/metrics.jsonl"))
        checkpoints = list((tmp_path / "parts").glob("killed/*/checkpoints/*.ckpt"))
        return files and checkpoints and len(files[0].read_text().splitlines()) >= 4

    wait_for(beyond_a_checkpoint, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (whole,), (parts,) = ((tmp_path / name).glob("killed/*") for name in ("whole", "parts"))
    assert not (parts / "summary.json").exists()
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"rollout":7,"train/loss":1}\n{"rollout": 8, "tra')  # later rows, the last torn
    (parts / "rollouts" / "000008.jsonl").write_text("{}\n")
    kdrl("fit", "--resume", parts)

    assert metrics_rows(parts) == metrics_rows(whole)
    assert [row["rollout"] for row in metrics_rows(whole) if "validation" not in row] == list(range(9))
    assert rollout_files(parts) == rollout_files(whole)
    ends = [torch.load(find_checkpoint(folder), weights_only=True) for folder in (whole, parts)]
    for part in ("state_dict", "optimizer_states", "kdrl", "loops"):
        assert difference(ends[0][part], ends[1][part]) is None, part
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, parts)]
    assert summaries[0]["val"] == summaries[1]["val"]
