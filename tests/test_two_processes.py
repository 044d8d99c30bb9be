"""The whole quick start on two processes learns what one process learns, to within what another seed changes."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from kdrl_pl.study.statistics import t_quantile

ROOT = Path(__file__).parents[1]
OVERLAYS = {"ddp": [], "fsdp2": ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.precision=32-true"]}


def interval_of_a_seed():
    """Where 95 in 100 further seeds of the quick start's setting end, from the seeds of docs/evidence.md."""
    evidence = json.loads((ROOT / "docs/evidence.json").read_text())
    seeds = evidence["arithmetic"]["kdrl_full_mask_response_thinned"]["pass@1"]
    n, mean = len(seeds), statistics.mean(seeds)
    half = t_quantile(0.975, n - 1) * statistics.stdev(seeds) * math.sqrt(1 + 1 / n)
    assert n == 5 and half < 0.1
    return mean - half, mean + half


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", OVERLAYS)
def test_the_quick_start_on_two_processes(strategy, tmp_path):
    # Red: ranks that train on the same rows, a gradient summed where it should be averaged or the reverse, rollouts
    # with weights of the step before: five rollouts can hide what a hundred and twenty show.
    files = [f"--config={ROOT / 'configs' / file}" for file in ("quickstart.yaml", f"trainer/{strategy}.yaml")]
    command = [sys.executable, "-m", "kdrl_pl", "fit", *files, *OVERLAYS[strategy], f"--run.root={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr[-4000:]
    (run,) = tmp_path.glob("quickstart/*")
    validations = json.loads((run / "summary.json").read_text())["val"]
    before, after = (validations[when]["addition"]["avg_at_k"] for when in ("before", "after"))
    low, high = interval_of_a_seed()
    print(f"{strategy}: {before:.1%} -> {after:.1%}, seeds {low:.1%} ... {high:.1%}")
    assert before < 0.2 and low < after < high
    assert len(list((run / "rollouts").glob("*-rank1.jsonl"))) == 5  # the second process sampled too
