"""docs/migrating.md says of TRL what TRL's own classes say. Needs TRL, or TRL_PATH (docs/performance.md)."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/migrating.md"
ASK = """
import dataclasses, inspect, json, trl
from trl import DistillationConfig, GRPOConfig, GRPOTrainer
from trl.experimental.gkd import GKDConfig
def fields(config):
    return {field.name: repr(field.default) for field in dataclasses.fields(config)}
told = {"version": trl.__version__, "trainer": list(inspect.signature(GRPOTrainer.__init__).parameters)}
told |= {config.__name__: fields(config) for config in (GRPOConfig, DistillationConfig, GKDConfig)}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def trl():
    """What TRL says of itself: version, arguments of the trainer, field -> default of its configs."""
    path = os.environ.get("TRL_PATH")
    if not path and not importlib.util.find_spec("trl"):
        pytest.skip("TRL is not installed, and TRL_PATH is not set")
    environment = os.environ | {"PYTHONPATH": path or "", "TRL_EXPERIMENTAL_SILENCE": "1"}
    ran = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_page_speaks_of_this_version(trl):
    assert f"TRL **{trl['version']}**" in PAGE.read_text()


def test_fields_are_there_and_have_the_defaults_that_it_says(trl):
    table = re.search(r"## GRPOConfig\n(.*?)\n## ", PAGE.read_text(), re.DOTALL)[1]
    defaults = 0
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        for name, default in re.findall(r"`(\w+)`(?: \(([^)]*)\))?", row):
            assert name in {*trl["GRPOConfig"], *trl["trainer"]}, name
            if default:
                said = {"true": True, "linear": "linear"}.get(default, default)
                said = ast.literal_eval(said) if isinstance(said, str) and said[0].isdigit() else said
                assert ast.literal_eval(trl["GRPOConfig"][name]) == said, name
                defaults += 1
    assert defaults >= 8


def test_the_distillation_trainers_too(trl):
    assert trl["DistillationConfig"]["beta"] == "1.0" and trl["DistillationConfig"]["temperature"] == "1.0"
    assert {name: trl["GKDConfig"][name] for name in ("beta", "lmbda", "temperature")} == {
        "beta": "0.5",
        "lmbda": "0.5",
        "temperature": "0.9",
    }
    assert {"seq_kd", "teacher_model_name_or_path"} <= set(trl["GKDConfig"])
    assert trl["GRPOConfig"]["use_bias_correction_kl"] == "True" and trl["GRPOConfig"]["loss_type"] == "'dapo'"
