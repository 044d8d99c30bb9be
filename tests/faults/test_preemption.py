"""A signal at any moment of a run: it saves the boundary before, says so by its exit status, and resumes bit-equal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from injectors import FaultyReward, SignalIn, SignallingEngine
from test_resume import difference, run, state
from tiny_run import fit, make_data, make_module, make_rollouts, make_trainer

from kdrl_pl import signals
from kdrl_pl.checkpoint import Checkpoints, find_checkpoint
from kdrl_pl.preemption import Preemption
from kdrl_pl.rollout.engine import RolloutInterrupted
from kdrl_pl.rollout.in_process import InProcessEngine

pytestmark = pytest.mark.faults

# Before training, `generate` is called twice: 3 problems of validation in batches of 2. Then once per rollout.
MOMENTS = {
    "first rollout": ({"engine": SignallingEngine(call=2, step=0)}, None, 0),
    "in a later one, last step": ({"engine": SignallingEngine(signal.SIGINT, call=4, step=11)}, None, 2),
    "in a validation": ({"engine": SignallingEngine(call=6, step=2)}, None, 3),
    "after the rollout": ({}, SignalIn("on_train_batch_start", rollout=2), 3),
    "during the updates": ({}, SignalIn("on_before_optimizer_step", rollout=3), 4),
    "before a validation": ({}, SignalIn("on_validation_start", rollout=3), 3),
    "in the last updates": ({}, SignalIn("on_before_optimizer_step", rollout=4), 5),
}


@pytest.fixture(scope="module")
def whole(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return state(folder, *run(folder, tiny_models, dict, val_check_interval=3))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_gave_way_resumes_bit_equal(moment, whole, tiny_models, tmp_path, capsys):
    settings, injector, done = MOMENTS[moment]
    callbacks = [injector, Preemption()] if injector else [Preemption()]
    signum = settings["engine"].signum if settings else injector.signum
    with pytest.raises(SystemExit) as ended:
        run(
            tmp_path,
            tiny_models,
            dict,
            val_check_interval=3,
            rollouts=make_rollouts(**settings),
            after=callbacks,
            checkpoints=Checkpoints(every_n_rollouts=100),
        )
    assert ended.value.code == 128 + signum
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.name == f"last-00000{done}.ckpt"
    assert capsys.readouterr().out.endswith(f"stopped by {signal.Signals(signum).name}: saved {checkpoint}\n")
    if settings:
        assert settings["engine"].later == 0  # no forward pass was begun after the signal
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signals.received() == 0
    module, trainer = run(tmp_path, tiny_models, dict, val_check_interval=3, resume=checkpoint, after=[Preemption()])
    assert difference(whole, state(tmp_path, module, trainer)) is None


def test_before_training_there_is_nothing_to_save(tiny_models, tmp_path, capsys):
    rollouts = make_rollouts(engine=SignallingEngine(call=1))
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, tiny_models, dict, rollouts=rollouts, after=[Preemption()])
    assert ended.value.code == 143
    assert "stopped by SIGTERM: nothing to save" in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()


def test_a_validate_command_gives_way_too(tiny_models, tmp_path):
    trainer = make_trainer(tmp_path, rollouts=make_rollouts(engine=SignallingEngine()), after=[Preemption()])
    with pytest.raises(SystemExit) as ended:
        trainer.validate(make_module(*tiny_models), datamodule=make_data())
    assert ended.value.code == 143


def test_an_engine_that_gives_up_by_itself_is_an_error(tiny_models, tmp_path):
    class Quitter(InProcessEngine):
        def generate(self, *arguments, **more):
            raise RolloutInterrupted("tired")

    with pytest.raises(RolloutInterrupted, match="tired"):
        fit(tmp_path, make_module(*tiny_models), rollouts=make_rollouts(engine=Quitter()), after=[Preemption()])


def wait_for(file, seconds=60):
    until = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < until, f"{file} was never written"
        time.sleep(0.01)


def test_a_second_sigint_ends_a_hanging_run_at_once(tiny_models, tmp_path):
    pid = os.fork()
    if pid == 0:
        reward = FaultyReward("hang", call=3, mark=str(tmp_path / "hangs"))
        try:
            run(tmp_path / "run", tiny_models, dict, rollouts=make_rollouts(reward=reward), after=[Preemption()])
        finally:
            os._exit(77)
    wait_for(tmp_path / "hangs")
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # it waits for its reward
    os.kill(pid, signal.SIGINT)
    started = time.monotonic()
    status = os.waitpid(pid, 0)[1]
    assert time.monotonic() - started < 5
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


CONFIG = """
model:
  student: checkpoints/testbeds/arithmetic/student
  teacher: {path: checkpoints/testbeds/arithmetic/teacher}
  normaliser: token
data:
  prompts_per_rollout: 4
  train: {addition: {source: addition, size: 12, options: {digits: 2}}}
  val: {addition: {source: addition, size: 4, options: {digits: 2}}}
rollout:
  reward:
    class_path: kdrl_pl.rewards.GuardedReward
    init_args: {max_failure_rate: 0.0, reward: {class_path: injectors.FaultyReward}}
  group_size: 4
  validation_samples: 2
  sampling: {max_tokens: 20}
trainer: {accelerator: cpu, val_check_interval: 5}
run: {name: faulty, max_rollouts: 6}
checkpoint: {every_n_rollouts: 2}
"""


def kdrl(folder: Path, *options, **environment) -> subprocess.Popen:
    """`kdrl fit` on tiny models as a process of its own, with the injectors at hand; stderr and stdout in one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "kdrl_pl", "fit", "--config", folder / "config.yaml", "--run.root", folder]
    return subprocess.Popen(
        [*map(str, command), "--allow-import", "injectors", *map(str, options)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )


ENGINE = ("--rollout.engine", "injectors.SignallingEngine")
TWO = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


@pytest.mark.distributed
def test_a_signal_to_rank_1_stops_both_within_a_token_step(tmp_path):
    """Called for the fourth time it decodes the third rollout: one validation batch comes first."""
    where = ("--rollout.engine.call", 3, "--rollout.engine.rank", 1, "--rollout.engine.mark", tmp_path / "later")
    process = kdrl(tmp_path, *TWO, *ENGINE, *where)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    checkpoint = find_checkpoint(next((tmp_path / "faulty").iterdir()))
    assert output.endswith(f"stopped by SIGTERM: saved {checkpoint}\n")
    assert checkpoint.name == "last-000002.ckpt"
    assert (tmp_path / "later").read_text() == "0"
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_to_a_rank_that_waits_for_the_other_stops_that_one(tmp_path):
    """Rank 0 has its responses and stands in a collective, where Python runs no handler; rank 1 needs a minute more."""
    slow = ("--rollout.engine", "injectors.SlowEngine", "--rollout.engine.rank", 1, "--rollout.engine.pause", 3)
    process = kdrl(tmp_path, *TWO, *slow, "--rollout.engine.mark", tmp_path / "slow")
    wait_for(tmp_path / "slow")
    time.sleep(2)
    started = time.monotonic()
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert time.monotonic() - started < 20  # one pass of 3 s, and two processes that end
    assert find_checkpoint(next((tmp_path / "faulty").iterdir())).name == "last-000000.ckpt"


@pytest.fixture(scope="module")
def whole_command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    process = kdrl(folder, *TWO)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return next((folder / "faulty").iterdir())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call", [1, 4, 6])
def test_commands_that_gave_way_resume_bit_equal(rank, signum, call, whole_command, tmp_path):
    where = ("--rollout.engine.call", call, "--rollout.engine.rank", rank, "--rollout.engine.signum", int(signum))
    process = kdrl(tmp_path, *TWO, *ENGINE, *where)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signum, output
    (parts,) = (tmp_path / "faulty").iterdir()
    resumed = kdrl(tmp_path, "--resume", parts, *TWO)
    output = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, output
    ends = [torch.load(find_checkpoint(folder), weights_only=True) for folder in (whole_command, parts)]
    for part in ("state_dict", "optimizer_states", "kdrl", "loops"):
        assert difference(ends[0][part], ends[1][part]) is None, part
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole_command, parts)]
    assert summaries[0]["val"] == summaries[1]["val"]
