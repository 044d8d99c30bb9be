"""Every recipe is listed with its words; a copy runs the settings of its files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kdrl_pl.__main__ import main
from kdrl_pl.cli.configs import read_configs
from kdrl_pl.cli.recipes import recipes

PAPER = ("grpo", "kd-rkl", "kdrl-constant", "kdrl-annealing", "kdrl-mask-response", "kdrl-mask-group")


def test_every_recipe_is_listed_with_words(capsys) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    assert set(named) == set(recipes()) and {"quickstart", "kdrl", *PAPER} <= set(named)
    assert all(len(text) > 10 for text in named.values())
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_arms_name_their_source_and_where_figures_are(name) -> None:
    header = recipes()[name].headers[0]
    assert "Source: the paper's" in header and "arXiv 2506.02208" in header and "docs/evidence.md" in header


def test_show_prints_header_command_and_what_it_sets(capsys) -> None:
    assert main(["recipes", "show", "kd_rkl", "--base", "quickstart"]) == 0
    out = capsys.readouterr().out
    command = "kdrl fit --config configs/quickstart.yaml --config configs/arms/kd_rkl.yaml --run.name kd-rkl"
    assert out.startswith("KD-RKL: on-policy distillation alone.") and command in out
    assert "56.1" in out and "policy_gradient: null" in out and "two cores" in out


def test_a_copied_arm_holds_the_settings_of_both_files(tmp_path, capsys) -> None:
    file = tmp_path / "new/mine.yaml"
    assert main(["recipes", "copy", "kdrl-mask-group", str(file), "--base", "quickstart"]) == 0
    settings = read_configs(["configs/quickstart.yaml", "configs/arms/kdrl_mask_group.yaml"])
    settings["run"]["name"] = "kdrl-mask-group"
    assert yaml.safe_load(file.read_text()) == settings
    assert file.read_text().startswith("# KDRL that distils only groups without a correct response.\n")
    assert main(["recipes", "copy", "kdrl-mask-group", str(file)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_a_copied_complete_config_keeps_its_comments(tmp_path, monkeypatch, capsys) -> None:
    text = Path("configs/kdrl.yaml").read_text()
    monkeypatch.chdir(tmp_path)  # the files of the library are found from anywhere
    assert main(["recipes", "copy", "kdrl"]) == 0
    assert (tmp_path / "kdrl.yaml").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "kdrl-anealing"], "did you mean kdrl-annealing?"),
        (["show"], "needs the name of a recipe"),
        (["list", "--base", "grpo"], "--base is grpo; expected one of debug, kdrl, quickstart, sft"),
    ],
)
def test_what_is_not_there(arguments, words, capsys) -> None:
    assert main(["recipes", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'lightning', 'transformers'}"
    code = f"import sys; from kdrl_pl.__main__ import main; main(['recipes']); print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("set()\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -u -m kdrl_pl recipes show kdrl | head -n 1"
    ran = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert ran.stderr == "" and ran.returncode in (0, 141)
