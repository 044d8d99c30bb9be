import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdrl_pl import resources
from kdrl_pl.models.loading import check_model_path
from kdrl_pl.resources import find

ROOT = Path(__file__).parents[1]


def test_what_comes_with_the_library_is_found_from_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find("configs/quickstart.yaml")) == ROOT / "configs/quickstart.yaml"
    student = "checkpoints/testbeds/arithmetic/student"
    assert Path(check_model_path(student)) == ROOT / student


def test_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.yaml").write_text("mine")
    assert find("configs/quickstart.yaml") == "configs/quickstart.yaml"


@pytest.mark.parametrize(
    "path",
    ["configs/../pyproject.toml", "../configs/quickstart.yaml", "pyproject.toml", "configs/none.yaml", "", "org/model"],
)
def test_other_paths_stay_as_they_are(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert find(path) == path


def test_a_wheel_keeps_to_its_own_folder(tmp_path, monkeypatch):
    """The folder beside the installed package is site-packages, where other packages may have a `configs`."""
    package = tmp_path / "site-packages/kdrl_pl"
    (package / "packaged/configs").mkdir(parents=True)
    (package / "packaged/configs/own.yaml").touch()
    (tmp_path / "site-packages/configs").mkdir()
    (tmp_path / "site-packages/configs/foreign.yaml").touch()
    monkeypatch.setattr(resources, "__file__", str(package / "resources.py"))
    assert find("configs/own.yaml") == str(package / "packaged/configs/own.yaml")
    assert find("configs/foreign.yaml") == "configs/foreign.yaml"


@pytest.mark.slow
def test_the_wheel_runs_the_quick_start_in_an_empty_folder(tmp_path):
    source, wheels, installed, empty = (tmp_path / name for name in ("source", "wheels", "installed", "empty"))
    source.mkdir()
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for folder in ("kdrl_pl", "configs", "checkpoints"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel], check=True)
    shutil.rmtree(source)
    empty.mkdir()
    ran = subprocess.run(
        [installed / "bin/kdrl", "fit", "--config", "configs/quickstart.yaml", "--run.max_rollouts", "3"],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert [entry.name for entry in empty.iterdir()] == ["runs"]
    (summary,) = empty.glob("runs/quickstart/*/summary.json")
    assert json.loads(summary.read_text())["rollouts"] == 3
