"""examples/: what they print is what the library's own commands log."""

import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from lightning.fabric import Fabric

from kdrl_pl.__main__ import main

ROOT = Path(__file__).parents[1]
ROLLOUTS, PROMPTS = 4, 8
SMALL = f"""
data: {{prompts_per_rollout: {PROMPTS}, val: {{addition: {{size: 8}}}}}}
trainer: {{logger: false, num_sanity_val_steps: 0}}
run: {{max_rollouts: {ROLLOUTS}}}
"""


@pytest.fixture(scope="module")
def by_trainer(tmp_path_factory):
    """Metrics and rows of every rollout of the quick start, with fewer prompts in each."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "small.yaml").write_text(SMALL)
    files = [ROOT / "configs/quickstart.yaml", folder / "small.yaml"]
    assert main(["fit", *(f"--config={file}" for file in files), f"--run.root={folder}"]) == 0
    (run,) = folder.glob("quickstart/*")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rollouts = [path.read_text().splitlines() for path in sorted((run / "rollouts").glob("*.jsonl"))]
    return [row for row in metrics if "train/loss" in row], [[json.loads(row) for row in rows] for rows in rollouts]


def assert_same(ours, metrics):
    assert len(ours) == len(metrics) == ROLLOUTS
    for row, logged in zip(ours, metrics, strict=True):
        assert row["rollout"] == logged["rollout"]
        assert row["reward"] == pytest.approx(logged["reward/mean"], rel=1e-5)
        assert row["loss"] == pytest.approx(logged["train/loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(logged["train/grad_norm"], rel=1e-4)
    assert len({row["loss"] for row in ours}) == ROLLOUTS  # something was learnt, and nothing is nought


def test_the_fabric_loop_trains_as_the_trainer_does(by_trainer):
    # Red: another seed or template, weights of another normaliser, a step without clipping or with the rate of another.
    spec = spec_from_file_location("fabric_loop", ROOT / "examples/fabric_loop.py")
    loop = module_from_spec(spec)
    spec.loader.exec_module(loop)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    metrics, rollouts = by_trainer
    seen = list(loop.train(fabric, ROLLOUTS, PROMPTS))
    for (rows, _), logged in zip(seen, rollouts, strict=True):
        ids = [i[m].tolist() for i, m in zip(rows.input_ids, rows.response_mask, strict=True)]
        assert ids == [row["response_ids"] for row in logged]
    assert_same([row for _, row in seen], metrics)


@pytest.mark.distributed
def test_the_fabric_loop_in_two_processes_trains_as_in_one(by_trainer):
    # Red: gradients averaged where the sum is wanted, or synchronised in every pass; ranks with the same prompts.
    options = [f"--rollouts={ROLLOUTS}", f"--prompts={PROMPTS}", "--devices=2"]
    ran = subprocess.run(
        [sys.executable, ROOT / "examples/fabric_loop.py", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.startswith("rollout ")]
    ours = [{name: float(value) for name, value in re.findall(r"(\w+) (\S+)", line)} for line in lines]
    assert_same(ours, by_trainer[0])
