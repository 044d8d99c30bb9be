"""One string names every kind of source; nothing misspelt turns into another kind."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from kdrl_pl.data.sources import SourceConfig, kind_of, read_rows


def write_rows(path: Path, first: int, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(first, first + count)))
    return path


def read(source: Path | str, **settings) -> list[tuple[int, str]]:
    return [(row.number, row.columns["prompt"]) for row in read_rows(SourceConfig(str(source), **settings))]


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("addition", "task"),
        ("reasoning_gym:chain_sum", "task"),
        ("here.jsonl", "files"),
        ("*.jsonl", "files"),
        ("./folder", "folder"),
        ("folder", "folder"),
        ("openai/gsm8k", "hub"),
        ("allenai/tulu-2.5", "hub"),
        ("owner/data.v2", "hub"),
    ],
)
def test_the_kind_of_a_source(source, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "here.jsonl", 0, 1)
    (tmp_path / "folder").mkdir()
    assert kind_of(source) == kind


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data/tarin.jsonl", "is a path, and nothing is there"),
        ("tarin.parqet", "is a path, and nothing is there"),
        ("./openai/gsm8k", "is a path, and nothing is there"),
        ("/openai/gsm8k", "is a path, and nothing is there"),
        ("~/no-such-folder", "is a path, and nothing is there"),
        ("../no/such", "is a path, and nothing is there"),
        ("tarin-*.jsonl", "matches no file"),
        ("adition", r"neither a task \(addition, countdown, knights, word_problems, reasoning_gym:<task>\) nor a path"),
        ("owner/name/more", "nor a hub name"),
        ("", "neither a task"),
    ],
)
def test_a_misspelt_source_never_reaches_the_hub(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        kind_of(source)


def test_a_glob_reads_its_files_in_order_and_numbers_rows_on(tmp_path):
    write_rows(tmp_path / "b.jsonl", 3, 2)
    write_rows(tmp_path / "a.jsonl", 0, 3)
    assert read(tmp_path / "*.jsonl") == [(1, "q0"), (2, "q1"), (3, "q2"), (4, "q3"), (5, "q4")]
    places = [row.where for row in read_rows(SourceConfig(str(tmp_path / "*.jsonl")))]
    assert places[3] == f"{tmp_path / 'b.jsonl'}, row 1"  # messages speak of the file


def test_size_takes_the_first_rows(tmp_path):
    assert read(write_rows(tmp_path / "a.jsonl", 0, 9), size=2) == [(1, "q0"), (2, "q1")]
    with pytest.raises(ValueError, match="size is 0"):
        read(tmp_path / "a.jsonl", size=0)


def test_a_folder_of_files_by_split_and_subset(tmp_path):
    write_rows(tmp_path / "main" / "train-00000-of-00001.jsonl", 0, 1)
    write_rows(tmp_path / "main" / "test-00000-of-00001.jsonl", 1, 1)
    write_rows(tmp_path / "other" / "train.jsonl", 2, 1)
    (tmp_path / "README.md").write_text("no rows")
    assert read(tmp_path, split="train") == [(1, "q0"), (2, "q2")]
    assert read(tmp_path, split="test", subset="main") == [(1, "q1")]
    assert len(read(tmp_path)) == 3
    with pytest.raises(ValueError, match=r"has 'validation' in its name; found main/test-00000"):
        read(tmp_path, split="validation")
    with pytest.raises(ValueError, match=r"absent holds no file with suffix \.jsonl"):
        read(tmp_path, subset="absent")


def test_a_data_set_saved_to_disk(tmp_path):
    train = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": ["1", "2", "3"]})
    train.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == [(1, "a"), (2, "b"), (3, "c")]
    both = datasets.DatasetDict({"train": train, "test": train.select([2, 0])})
    both.save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two", split="test") == [(1, "c"), (2, "a")]
    rows = list(read_rows(SourceConfig(str(tmp_path / "two"), split="train", columns=[]), keep=["prompt"]))
    assert rows[0].columns == {"prompt": "a"}
    with pytest.raises(ValueError, match="has no split 'val'; it has train, test"):
        read(tmp_path / "two", split="val")
    with pytest.raises(ValueError, match="has several splits; set split to one of train, test"):
        read(tmp_path / "two")
    with pytest.raises(ValueError, match="holds one data set without splits; remove split"):
        read(tmp_path / "one", split="train")


def test_an_unreachable_hub_data_set_names_the_local_spelling():
    with pytest.raises(
        ValueError, match=r"'no-such-owner/none' cannot be loaded from the hub: .*\./no-such-owner/none"
    ):
        read("no-such-owner/none", split="train")


def test_settings_that_would_be_dead_are_refused(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", 0, 1)
    for setting, value in (("split", "train"), ("subset", "main"), ("revision", "v1"), ("options", {"digits": 3})):
        with pytest.raises(ValueError, match=f"{setting} has no meaning for source"):
            read(file, **{setting: value})
    with pytest.raises(ValueError, match="columns has no meaning for source 'addition'"):
        read("addition", size=1, columns=[])


def test_a_task_needs_a_size_and_takes_the_default_split():
    with pytest.raises(ValueError, match="set size, the number of problems"):
        read("addition")
    config = SourceConfig("addition", size=5)
    train, val = (list(read_rows(config, split)) for split in ("train", "val"))
    assert [row.number for row in val] == [1, 2, 3, 4, 5]
    assert not {r.columns["prompt"] for r in train} & {r.columns["prompt"] for r in val}
    explicit = list(read_rows(SourceConfig("addition", size=5, split="val"), "train"))
    assert explicit == val
