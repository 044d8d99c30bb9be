"""The README.md of an exported folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from run_folders import config, write_run

from kdrl_pl.model_card import model_card, write_model_card
from kdrl_pl.models.tiny import write_tiny
from kdrl_pl.report.run import read_run


def card_of(tmp_path, settings=None, done=4, **more):
    return model_card(read_run(write_run(tmp_path / "made" / "1", settings=settings)), done, "student", **more)


def head(card):
    """The YAML head, as the hub reads it."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_the_head_is_one_the_hub_reads(tmp_path):
    card = card_of(tmp_path, config(student="org/base-1.5B"))
    assert head(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base-1.5B",
        "tags": ["kdrl_pl", "reinforcement-learning", "grpo", "distillation"],
    }
    assert "No licence is stated yet." in card and "\n# license: yours to choose" in card


def test_local_folders_are_no_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "student").mkdir(parents=True)
    for path in ("my/student", "checkpoints/testbeds/arithmetic/student", "/abs/path", "~/x"):
        assert "base_model" not in head(card_of(tmp_path, config(student=path)))
    settings = config()
    settings["data"]["train"] = {"gsm8k": {"source": "openai/gsm8k"}, "sums": {"source": "addition"}}
    assert head(card_of(tmp_path, settings))["datasets"] == ["openai/gsm8k"]


def test_what_was_trained_and_how_well(tmp_path):
    card = card_of(tmp_path, best=True)
    assert "by reinforcement learning (GRPO) and on-policy distillation from a frozen teacher in one objective" in card
    assert "The teacher is `teacher` in float32. Distillation is the reverse KL on the sampled tokens (k2)." in card
    assert "This is the student after 4 rollouts of the run `made/1`." in card
    assert "| set | | correct | pass@4 | length | cut off | KL to teacher |" in card
    assert (
        "| sums | before | 25.0% | 37.5% | 20 | 0.0% | 1.5 |\n| sums | after | 50.0% | 62.5% | 21 | 0.0% | 0.5 |"
        in card
    )
    assert "`correct` is the mean over 4 samples per problem." in card and "its figures flatter it" in card
    assert "- sums: `addition`" in card and "torch 2.13.0, Python 3.11.7" in card
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert recipe["model"] == config()["model"] and set(recipe) == {"model", "rollout"}


def test_the_results_are_those_of_the_checkpoint(tmp_path):
    card = card_of(tmp_path, done=2)
    assert "| sums | after | 37.5% |" in card and "flatter" not in card
    assert "This checkpoint was not validated." in card_of(tmp_path, done=3)


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ("distillation", "by reinforcement learning (GRPO) alone"),
        ("policy_gradient", "by on-policy distillation from a frozen teacher alone"),
    ],
)
def test_one_half_of_the_objective(tmp_path, left_out, expected):
    settings = config()
    del settings["model"][left_out]
    assert expected in card_of(tmp_path, settings)


def test_masks_are_named(tmp_path):
    settings = config()
    settings["model"]["distillation"]["init_args"] |= {"mask": "group", "estimator": "full"}
    assert "reverse KL over the whole vocabulary, on groups without a right response only." in card_of(
        tmp_path, settings
    )


def test_sft(tmp_path):
    settings = config()
    for section in ("rollout", "data"):
        del settings[section]
    card = model_card(read_run(write_run(tmp_path / "sft", rollouts=0, settings=settings)), 100, "x")
    assert "fine-tuned on text (SFT)" in card and "after 100 steps" in card and head(card)["tags"] == ["kdrl_pl", "sft"]


def test_a_prompt_of_a_model_stays_text(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    for row in (row for sample in run.samples.values() for row in sample["rows"]):
        row["prompt"] = "'''\x1b[2J\"\\' ```\n# x"
    assert "\x1b" not in model_card(run, 4, "x") and "prompt = '...'" in model_card(run, 4, "x")


def test_the_python_of_the_card_runs(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "made" / "1")
    write_tiny(tmp_path / "student", 64, 1)
    write_model_card(run, Path("checkpoints/best-000004.ckpt"), tmp_path / "student")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "student" / "README.md").read_text(), re.DOTALL)
    assert "prompt = '123+456='" in code and "folder = 'student'" in code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1] == 8
    assert capsys.readouterr().out.endswith("\n")


def test_an_adapter_is_loaded_on_its_base(tmp_path):
    card = card_of(tmp_path, adapter=True)
    assert head(card)["library_name"] == "peft" and "PeftModel.from_pretrained(AutoModelForCausalLM" in card
