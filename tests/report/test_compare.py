"""Several runs over each other."""

from __future__ import annotations

import dataclasses

import pytest
from run_folders import config, write_run

from kdrl_pl.report.compare import comparable, compare_page, compare_text, differences, labels
from kdrl_pl.report.run import read_run


@pytest.fixture
def runs(tmp_path):
    first = write_run(tmp_path / "kdrl" / "1")
    settings = config(normaliser="group")
    del settings["model"]["distillation"]
    second = write_run(tmp_path / "grpo" / "1", rollouts=2, finished=False, settings=settings)
    return [read_run(first), read_run(second)]


def test_the_table_in_the_terminal(runs):
    results, settings = compare_text(runs).split("\n\n")
    assert results.splitlines() == [
        "sums  correct before  after  length  cut off  KL to teacher  rollouts  seconds",
        "------------------------------------------------------------------------------",
        "kdrl  25.0%           50.0%  21      0.0%     0.5            4         16",
        "grpo  25.0%           50.0%  21      0.0%     0.5            2         8",
    ]
    rows = [line.split() for line in settings.splitlines()]
    assert rows[0] == ["setting", "kdrl", "grpo"]
    assert ["model.normaliser", "token", "group"] in rows
    assert ["model.distillation", "kdrl_pl.Distillation", "null"] in rows
    assert not any(row[0].startswith("model.distillation.") for row in rows if row)
    assert not any("trainer" in row[0] for row in rows if row)


def test_settings_of_an_object_that_some_runs_lack(tmp_path):
    settings = [config(), config(), config()]
    settings[1]["model"]["distillation"]["init_args"]["coef"] = 0.25
    del settings[2]["model"]["distillation"]
    runs = [read_run(write_run(tmp_path / str(i), settings=s)) for i, s in enumerate(settings)]
    assert differences(runs) == [
        ("model.distillation", ["kdrl_pl.Distillation", "kdrl_pl.Distillation", None]),
        ("model.distillation.coef", [0.5, 0.25, None]),
    ]


def test_the_page(runs):
    page = compare_page(runs)
    assert "kdrl: 10 % at rollout 1, 40 % at rollout 4" in page and "grpo: 10 % at rollout 1, 20 % at rollout 2" in page
    assert '<th scope="row">model.<wbr>normaliser</th><td>token</td><td>group</td>' in page
    assert '<th scope="row">kdrl</th><td>25.0%</td><td>50.0%</td>' in page
    assert 'class="line s1"' in page and "Coefficient of kd" in page


def test_a_run_has_one_colour_also_where_another_lacks_the_metric(runs):
    rows = [{k: v for k, v in row.items() if k != "teacher/reverse_kl"} for row in runs[0].training]
    page = compare_page([dataclasses.replace(runs[0], training=rows), runs[1]])
    chart = page.partition("KL to the teacher: of the tokens that are distilled")[2].partition("</figure>")[0]
    assert 'class="line s1"' in chart and 'class="key b1"' in chart
    assert "s0" not in chart and "b0" not in chart and "kdrl" not in chart


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / "a" / time) for time in ("1", "2")]
    assert labels([read_run(folder) for folder in folders]) == ["a/1", "a/2"]


def test_equal_settings(tmp_path):
    runs = [read_run(write_run(tmp_path / name / "1")) for name in "ab"]
    assert differences(runs) == [] and "All settings are the same." in compare_text(runs)
    assert "the runs have the same settings" in compare_page(runs)


def test_what_cannot_be_compared(tmp_path, runs):
    settings = config()
    del settings["rollout"]
    sft = read_run(write_run(tmp_path / "sft" / "1", rollouts=0, settings=settings))
    for given, message in (
        (runs[:1], "at least two"),
        ([runs[0], runs[1], runs[0]], "is given twice"),
        ([runs[0], sft], "no metric in common"),
    ):
        with pytest.raises(ValueError, match=message):
            comparable(given)


def test_names_are_escaped(tmp_path):
    runs = [read_run(write_run(tmp_path / name / "1")) for name in ("<b>x", "y")]
    assert "<b>x" not in compare_page(runs)
