"""The multi-node examples: two machines of one process each, played by two launchers on this one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import metrics_rows

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples/multi_node").glob("*.sh"))


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_on_two_machines(tmp_path):
    overlay = tmp_path / "cpu.yaml"
    overlay.write_text("trainer: {accelerator: cpu, strategy: fsdp2, logger: false}\ncheckpoint: {sharded: true}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "NODES": "2", "GPUS": "1", "MASTER": "127.0.0.1", "PORT": str(port), "STRATEGY": str(overlay),
        "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    arguments = ["--config", "configs/debug.yaml", "--run.root", str(tmp_path), "--data.val.addition.size", "2"]
    machines = [
        subprocess.Popen(
            ["bash", "examples/multi_node/torchrun.sh", *arguments],
            env={**environment, "NODE_RANK": str(number)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [machine.communicate(timeout=180)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)[-4000:]
    (run,) = (tmp_path / "debug").iterdir()
    rows = metrics_rows(run)
    assert [row["rollout"] for row in rows if "train/loss" in row] == [0, 1]
    names = {path.name for path in (run / "rollouts").iterdir()}
    assert {"000000.jsonl", "000000-rank1.jsonl"} <= names
    assert list(run.glob("checkpoints/last-000002.sharded.ckpt/*-rank-00001-of-00002.pt"))


def test_the_slurm_job_gives_ranks_their_cores_and_queues_itself_again(tmp_path):
    """Slurm is not here: programs in its place write down how they were called."""
    for name, status in (("srun", 143), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\nexit {status}\n')
        program.chmod(0o755)
    numbers = {"NNODES": "2", "NTASKS_PER_NODE": "8", "CPUS_PER_TASK": "6", "JOB_ID": "17"}
    job = subprocess.run(
        ["bash", "examples/multi_node/slurm.sh", "--config", "configs/kdrl.yaml"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **{f"SLURM_{name}": said for name, said in numbers.items()}},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert job.returncode == 143
    started, requeued = job.stdout.splitlines()
    assert "srun --cpus-per-task 6 --kill-on-bad-exit=1 python -m kdrl_pl fit --config configs/kdrl.yaml" in started
    assert "--trainer.num_nodes 2 --trainer.devices 8 --resume auto" in started
    assert requeued == "scontrol requeue 17"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_sound_shell(path):
    assert len(EXAMPLES) == 2
    subprocess.run(["bash", "-n", path], check=True)
