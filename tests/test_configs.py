"""Every file under configs parses and reaches the settings it names; every overlay trains on the quick start."""

import inspect
import json
import math
from pathlib import Path

import pytest
import yaml

from kdrl_pl import Distillation, KDRLModule, PolicyGradient
from kdrl_pl.__main__ import main

CONFIGS = Path(__file__).parents[1] / "configs"
SFT = [CONFIGS / "sft.yaml"]
COMPLETE = [CONFIGS / name for name in ("quickstart.yaml", "kdrl.yaml", "debug.yaml")]
STUDIES = sorted(CONFIGS.glob("studies/*.yaml"))
TESTBEDS = [CONFIGS / f"testbeds/{name}.yaml" for name in ("arithmetic", "knights")]
TESTBED_SFT = [CONFIGS / "testbeds/sft.yaml", *sorted(CONFIGS.glob("testbeds/sft/*.yaml"))]  # the rest over the first
STRESSED = [path for path in sorted(CONFIGS.glob("testbeds/*.yaml")) if path not in [*TESTBEDS, *TESTBED_SFT]]
ESTIMATES = sorted(CONFIGS.glob("estimate/*.yaml"))  # models without weights, for kdrl estimate
OTHERS = [*SFT, *STUDIES, *TESTBEDS, *TESTBED_SFT, *STRESSED, *ESTIMATES]
OVERLAYS = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path not in OTHERS]
SMALL = """
data:
  prompts_per_rollout: 4
  val_batch_size: 16
  train: {addition: {source: addition, size: 64, options: {digits: 3}}}
  val: {addition: {source: addition, size: 16, options: {digits: 3}}}
rollout: {group_size: 4, validation_samples: 1, validation_sampling: null, sampling: {max_tokens: 32}}
trainer: {accelerator: cpu, devices: 1, strategy: auto, logger: false}
run: {max_rollouts: 2}
"""


def name_of(path):
    return str(path.relative_to(CONFIGS))


def settings(node, path=()):
    """Every leaf as (path, value); `init_args` is left out of paths, since a file may leave it out as well."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from settings(value, path if key == "init_args" else (*path, key))
    else:
        yield path, node


def test_no_file_is_forgotten():
    assert sorted(CONFIGS.rglob("*.yaml")) == sorted([*COMPLETE, *OVERLAYS, *OTHERS])


def test_every_arm_is_explained():
    page = (CONFIGS.parent / "docs/arms.md").read_text()
    assert [path.name for path in sorted(CONFIGS.glob("arms/*.yaml")) if f"`{path.name}`" not in page] == []


def test_the_recipe_of_the_paper_is_complete():
    """Every argument of the objective stands in it, so that a reader sees what the recipe is."""
    model = yaml.safe_load((CONFIGS / "kdrl.yaml").read_text())["model"]
    for cls, section in ((KDRLModule, model), (PolicyGradient, model["policy_gradient"])):
        assert set(inspect.signature(cls).parameters) == set(section)
    left_out = {"transform_bound", "top_k"}  # without a transform, or another estimator, they mean nothing
    assert set(inspect.signature(Distillation).parameters) - left_out == set(model["distillation"])


def files_below(path):
    """What a file lies over."""
    if path in STRESSED:
        return [path.with_name(f"{path.stem.split('_')[0]}.yaml")]
    return [COMPLETE[0]] if path in OVERLAYS else TESTBED_SFT[:1] if path in TESTBED_SFT[1:] else []


@pytest.mark.parametrize("path", [*COMPLETE, *OVERLAYS, *TESTBEDS, *STRESSED, *SFT, *TESTBED_SFT[1:]], ids=name_of)
def test_every_setting_of_a_file_arrives(path, capsys):
    command, base = "sft" if path in [*SFT, *TESTBED_SFT] else "fit", files_below(path)
    with pytest.raises(SystemExit) as ended:
        main([command, *(f"--config={file}" for file in [*base, path]), "--print_config"])
    assert not ended.value.code
    arrived = dict(settings(yaml.safe_load(capsys.readouterr().out)))
    for where, value in settings(yaml.safe_load(path.read_text())):
        assert arrived[where] == value, f"{path}: {'.'.join(where)}"


def run(files, overlay, folder, capsys):
    """Metrics of two small rollouts, one dict each."""
    (folder / "overlay.yaml").write_text(overlay)
    files = [*files, folder / "overlay.yaml"]
    status = main(["fit", *(f"--config={file}" for file in files), f"--run.root={folder}"])
    assert status == 0, capsys.readouterr().err
    (file,) = folder.glob("*/*/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


TRAINABLE = [
    pytest.param(p, marks=pytest.mark.vllm) if p.stem == "vllm" else p
    for p in OVERLAYS
    if p.parent.name not in ("data", "estimate")  # the latter are shapes without weights
    and p.stem != "vllm_server"  # that one: tests/rollout/test_vllm_server.py
    and not p.stem.startswith("remote")  # those: tests/teacher/test_remote.py and test_vllm.py
]


@pytest.mark.parametrize("path", TRAINABLE, ids=name_of)
def test_every_overlay_trains_on_the_quick_start(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path.stem == "vllm":
        pytest.importorskip("vllm")
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    if "competence" in path.name:  # the command that the file names
        predict = ["predict", f"--config={COMPLETE[0]}", "--rollout.policy=teacher", "--output=teacher.jsonl"]
        assert main([*predict, "--data.predict.addition.size=64", "--rollout.validation_samples=2"]) == 0
    rows = run([COMPLETE[0], path], SMALL, tmp_path, capsys)
    assert [row["rollout"] for row in rows] == [0, 1]
    for row in rows:
        assert all(value is not None and math.isfinite(value) for value in row.values()), row
    names = {name for row in rows for name in row}
    overlay = yaml.safe_load(path.read_text()).get("model", {})
    assert ("train/pg_loss" in names) == (overlay.get("policy_gradient", ...) is not None)
    assert ("train/kd_loss" in names) == (overlay.get("distillation", ...) is not None)


@pytest.mark.parametrize("path", [*TESTBEDS, *STRESSED], ids=name_of)
def test_every_testbed_trains(path, tmp_path, capsys):
    name = path.stem.split("_")[0]
    sizes = f"""
data: {{prompts_per_rollout: 4, val_batch_size: 16, train: {{{name}: {{size: 64}}}}, val: {{{name}: {{size: 16}}}}}}
rollout: {{group_size: 4, validation_samples: 1}}
trainer: {{logger: false}}
run: {{max_rollouts: 2}}
"""
    rows = run([*files_below(path), path], sizes, tmp_path, capsys)
    assert [row["rollout"] for row in rows] == [0, 1]
    assert all(value is not None and math.isfinite(value) for row in rows for value in row.values())


def test_every_model_of_the_testbeds_has_its_recipe():
    models = {f"{path.parent.name}-{path.name}" for path in (CONFIGS.parent / "checkpoints/testbeds").glob("*/*")}
    assert models == {path.stem for path in TESTBED_SFT[1:]}


def test_the_recipe_of_the_paper_runs_at_the_size_of_debug(tmp_path, capsys):
    on_addition = """
data: {template: {text: "{prompt}"}, train: {deepmath: null}, val: {aime24: null, amc23: null}}
rollout: {validation_sampling: {max_tokens: 32}}
"""
    rows = run([CONFIGS / "kdrl.yaml", CONFIGS / "debug.yaml"], on_addition, tmp_path, capsys)
    assert [row["train/kd_coef"] for row in rows] == pytest.approx([5e-3, 4.95e-3])
