"""Config files laid over each other: what an overlay reaches and what it leaves alone."""

from __future__ import annotations

import pytest
import yaml

from kdrl_pl.cli.configs import merge, merge_configs


def test_an_overlay_reaches_one_named_thing_and_leaves_its_neighbours():
    below = {"data": {"train": {"a": {"source": "x", "size": 3}, "b": {"source": "y"}}}}
    above = {"data": {"train": {"a": {"size": 5}}}}
    assert merge(below, above) == {"data": {"train": {"a": {"source": "x", "size": 5}, "b": {"source": "y"}}}}


def test_null_takes_a_thing_away_and_a_list_is_replaced():
    assert merge({"a": {"x": 1}, "l": [1, 2]}, {"a": None, "l": [3]}) == {"a": None, "l": [3]}


def test_arguments_of_the_same_class_merge_and_another_class_brings_its_own():
    linear = {"class_path": "Linear", "init_args": {"start": 1, "floor": 0}}
    same = {"class_path": "Linear", "init_args": {"floor": 0.5}}
    assert merge(linear, same)["init_args"] == {"start": 1, "floor": 0.5}
    assert merge(linear, {"start": 2})["init_args"] == {"start": 2, "floor": 0}
    other = {"class_path": "Cosine", "init_args": {"end": 0}}
    assert merge(linear, other) == other


def test_a_class_of_ours_is_the_same_under_its_short_path():
    """A run's config.yaml names what `kdrl_pl` exports by that path; an overlay by where it lives."""
    saved = {"class_path": "kdrl_pl.InProcessEngine", "init_args": {"max_rows": 64, "dtype": None}}
    overlay = {"class_path": "kdrl_pl.rollout.in_process.InProcessEngine", "init_args": {"max_rows": 8}}
    assert merge(saved, overlay)["init_args"] == {"max_rows": 8, "dtype": None}
    theirs = {"class_path": "bitsandbytes.optim.AdamW", "init_args": {"lr": 1}}
    mine = {"class_path": "torch.optim.AdamW", "init_args": {"eps": 1}}
    assert merge(theirs, mine) == mine


def test_the_merged_file_comes_first_so_that_the_command_line_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {x: 1, y: 1}\n")
    (tmp_path / "b.yaml").write_text("model: {y: 2}\n")
    arguments = ["--model.x", "3", "--config", f"{tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml"]
    option, text, *rest = merge_configs(arguments)
    assert (option, rest) == ("--config", ["--model.x", "3"])
    assert yaml.safe_load(text) == {"model": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [("- 1\n", "holds a list; expected sections"), ("a: [1\n", "not readable as YAML"), (None, "no config file")],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        merge_configs(["--config", str(path)])
    assert "c.yaml" in str(error.value)
