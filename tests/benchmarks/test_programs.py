"""Every benchmark program runs from its command line to its table, at tiny sizes, and measures what it says.

What they start in fresh processes runs in this one here; `test_processes.py` has the processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    if path := os.environ.get("TRL_PATH"):
        monkeypatch.syspath_prepend(path)


def program(name, monkeypatch, tmp_path):
    """The module of a program; the jobs it gives to fresh processes run here."""
    module = importlib.import_module(name)

    def here(arguments, threads, python_path=None):
        file = tmp_path / "job.json"
        module.main([*arguments[1:], "--json", str(file)])
        return json.loads(file.read_text())

    if hasattr(module, "run_json"):
        monkeypatch.setattr(module, "run_json", here)
    return module


def run(name, monkeypatch, tmp_path, *options):
    """The report a program wrote."""
    file = tmp_path / f"{name}.json"
    program(name, monkeypatch, tmp_path).main([*options, "--miniature", "--threads", "1", "--output", str(file)])
    return json.loads(file.read_text())


def test_a_step_is_timed_and_responses_end_where_the_table_says():
    from common import kdrl_side
    from common.workloads import WORKLOADS, miniature

    workload = miniature(WORKLOADS["b"])
    assert len(set(workload.lengths(1))) > 1  # uneven; the clock of the run compares lengths with the table
    result = kdrl_side.run(workload)
    (step,) = result["steps"]
    phases = [step[phase] for phase in ("rollout", "teacher", "update")]
    assert min(phases) > 0
    assert 0.5 * step["step"] < sum(phases) + step["score"] <= step["step"]
    assert result["peak_mb"] > 0


def test_a_run_that_does_not_do_the_workload_is_refused(monkeypatch):
    from common import kdrl_side
    from common.workloads import WORKLOADS, miniature

    monkeypatch.setattr(kdrl_side.Lengths, "uniforms", lambda self, *arguments: self.original(*arguments))
    with pytest.raises(RuntimeError, match="the workload is"):
        kdrl_side.run(miniature(WORKLOADS["b"]))


def test_the_full_workloads_are_those_of_the_page():
    from common.workloads import WORKLOADS

    sizes = {name: round(w.model_weights / 1e6, 1) for name, w in WORKLOADS.items()}
    assert sizes == {"a": 7.3, "b": 2.0, "c": 7.3, "d": 79.3, "e32": 134.5, "e16": 134.5}
    assert [WORKLOADS[name].rows for name in "abcd"] == [16, 64, 16, 16]
    for step in (1, 2, 3):
        lengths = WORKLOADS["b"].lengths(step)
        assert len(lengths) == 64 and max(lengths) == 256 and sorted(lengths)[32] < 100
    assert WORKLOADS["b"].lengths(0) == [4] * 64


def test_counted_work_can_be_redone_by_hand():
    from common.counting import least_work
    from common.workloads import Shape, Workload

    one = Shape(hidden=2, intermediate=4, layers=1, heads=1, kv_heads=1)
    assert one.body_weights == 4 * 2 * 2 + 3 * 2 * 4  # four projections, three of the feed-forward part
    workload = Workload("", one, one, 10, prompts=1, group=2, prompt_tokens=3, response_tokens=2)
    work = least_work(workload, 1)
    tokens = 3 + 2 * 2
    reach = (1 + 2 + 3) + 2 * (4 + 5)  # tokens that each token looks at, itself included
    forward = 2 * 40 * tokens + 2 * 10 * 2 * 4 + 4 * 1 * 2 * reach
    assert work["teacher"].operations == work["score"].operations == work["rollout"].operations == forward
    assert work["update"].operations == 3 * forward
    weights = 40 + 2 * 10  # the head is read, the embedding looked up
    assert work["score"].bytes == 4 * weights
    keys = 2 * 2 * (2 * (0 + 1) + 2 * 3)  # keys and values: of earlier response tokens, and of the prompt twice
    assert work["rollout"].bytes == 4 * (2 * weights + keys)
    assert work["update"].bytes == 2 * 4 * weights + 7 * 4 * (40 + 2 * 20)
    assert work["score"].least_seconds(forward / 3, 1e9) == pytest.approx(3)
    assert work["score"].bound(forward / 3, 1e9) == "matrix products"
    assert work["score"].bound(1e12, 1) == "memory"


def test_roofline(monkeypatch, tmp_path, capsys):
    report = run("roofline", monkeypatch, tmp_path, "--workloads", "a")
    assert min(report["ceilings"].values()) > 1e6
    phases = report["workloads"]["a"]["phases"]
    assert set(phases) == {"rollout", "teacher", "score", "update"}
    assert all(0 < phase["share"] < 1 for phase in phases.values())
    assert capsys.readouterr().out.count("| a: ") == 4


def test_memory(monkeypatch, tmp_path, capsys):
    report = run("memory", monkeypatch, tmp_path, "--forms", "kdrl_pl,plain")
    assert [(row["phase"], row["vocabulary"]) for row in report["rows"]] == [
        ("score", 512),
        ("score", 1024),
        ("update", 512),
        ("update", 1024),
    ]
    assert "| update | 1,024 |" in capsys.readouterr().out


def test_scaling_rows(monkeypatch, tmp_path, capsys):
    report = run("scaling_rows", monkeypatch, tmp_path, "--rows", "4,8")
    assert [row["tokens"] for row in report["rows"]] == [48, 96]
    assert min(report["last_over_least"].values()) >= 1
    assert "| 8 | 96 |" in capsys.readouterr().out


def test_scaling(monkeypatch, tmp_path, capsys):
    report = run("scaling", monkeypatch, tmp_path, "--layouts", "one;one, 2 threads")
    one = report["layouts"]["one"]
    assert one["sent_bytes"] == one["estimated"]["sent_bytes"] == 0
    assert one["tokens"] == 16 * (16 + 12) and min(one["seconds"].values()) > 0
    assert "| one, 2 threads | 1 x 1 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no layout three"):
        run("scaling", monkeypatch, tmp_path, "--layouts", "three")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_bytes_between_two_processes_are_those_estimated(layout, tmp_path):
    file = tmp_path / "report.json"
    importlib.import_module("scaling").main(["--miniature", "--layouts", layout, "--output", str(file)])
    found = json.loads(file.read_text())["layouts"][layout]
    # signs of life and metrics are some bytes each
    assert found["estimated"]["sent_bytes"] <= found["sent_bytes"] < found["estimated"]["sent_bytes"] + 4000


def test_estimate(monkeypatch, tmp_path, capsys):
    report = run("estimate", monkeypatch, tmp_path, "--cases", "uneven")
    case = report["cases"]["uneven"]
    assert set(case["estimated"]) == set(case["measured"]) == {"rollout", "teacher", "update"}
    assert "| uneven |" in capsys.readouterr().out


@pytest.mark.slow
def test_estimated_memory_is_what_processes_take(tmp_path):
    """Several shapes, in fresh processes, as much as they take to dwarf what is not tensors."""
    file = tmp_path / "report.json"
    cases = ("uneven", "grouped heads", "recomputed", "wide vocabulary")
    arguments = ["--cases", ",".join(cases), "--threads", "1", "--output", str(file)]
    importlib.import_module("estimate").main(arguments)
    found = json.loads(file.read_text())["cases"]
    assert {name: case["ratio"] for name, case in found.items()} == {name: pytest.approx(1, abs=0.15) for name in cases}


def test_layouts(tmp_path, capsys):
    file = tmp_path / "report.json"
    runs = "7 B, DDP;32 B, sharded on 64;served"
    importlib.import_module("layouts").main(["--miniature", "--runs", runs, "--output", str(file)])
    report = json.loads(file.read_text())
    assert report["7 B, DDP"]["layout"] == "ddp" and report["served"]["memory"]["held"]["teacher"] == 0
    assert report["32 B, sharded on 64"]["command"].startswith("kdrl estimate --config configs/kdrl.yaml")
    assert "| served | " in capsys.readouterr().out


def test_tables_are_written_into_the_page(tmp_path):
    tables = importlib.import_module("tables")
    spread = {"median": 1.5, "min": 1.0, "max": 2.0}
    found = {"processor": spread, "wall": spread, "ratio": spread}
    machine = {"processor": "P", "threads": 2, "python": "3"}
    (tmp_path / "startup.json").write_text(json.dumps({"machine": machine, "commands": {"kdrl": found}}))
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- startup -->\nold\n<!-- end -->\nb\n<!-- memory -->\nkept\n<!-- end -->\n")
    for _ in range(2):  # the second time there is a table to replace
        tables.main(["--page", str(page), "--results", str(tmp_path)])
    text = page.read_text()
    assert "old" not in text and text.count("| `kdrl` | 1.50 | 1.50 | 1.50 (1.00–2.00) |") == 1
    assert text.startswith("a\n<!-- startup -->\n") and text.endswith("b\n<!-- memory -->\nkept\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no benchmark makes a table 'nothing'"):
        tables.filled("<!-- nothing -->\n<!-- end -->\n", tmp_path)


def test_the_page_has_a_place_for_every_table():
    from common.markdown import TABLES
    from tables import PAGES

    page = "".join(page.read_text() for page in PAGES)
    assert all(f"<!-- {name} -->\n" in page and f"results/{name}.json" in page for name in TABLES)


def test_against_trl(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(os.environ.get("TRL_PATH", ""))
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed (extra bench, or TRL_PATH)")
    report = run("vs_trl", monkeypatch, tmp_path, "--workloads", "a,b", "--repeats", "1")
    assert report["agreement"]["gradient"] < 1e-5  # else it refuses to time anything
    assert set(report["workloads"]) == {"a", "b"}
    assert report["workloads"]["b"]["speed_ratio"]["step"]["median"] > 0
    assert report["workloads"]["b"]["memory_ratio"]["median"] > 0
    assert "| b | trl |" in capsys.readouterr().out


@pytest.mark.slow
def test_kdrl_against_grpo(tmp_path, capsys):
    file = tmp_path / "report.json"
    importlib.import_module("kdrl_vs_grpo").main(["--miniature", "--repeats", "1", "--output", str(file)])
    report = json.loads(file.read_text())
    assert report["GRPO"]["teacher"]["median"] < 0.1 * report["KDRL"]["teacher"]["median"]
    assert "| GRPO |" in capsys.readouterr().out


@pytest.mark.slow
def test_starting_costs_little_more_than_importing_lightning(tmp_path):
    """Start-up is lazy: what the command line imports on top of Lightning's own is small."""
    file = tmp_path / "report.json"
    importlib.import_module("startup").main(["--repeats", "3", "--output", str(file)])
    commands = json.loads(file.read_text())["commands"]
    assert commands["kdrl fit --print_config"]["ratio"]["median"] < 1.3
    assert commands["kdrl --help"]["wall"]["median"] < 1.5


def test_start_up_is_measured_in_turns(monkeypatch, tmp_path, capsys):
    startup = importlib.import_module("startup")
    loop = "sum(range(3_000_000))"
    commands = {startup.LIGHTNING: [sys.executable, "-c", "pass"], "kdrl": [sys.executable, "-c", loop]}
    monkeypatch.setattr(startup, "COMMANDS", commands)
    startup.main(["--repeats", "1", "--output", str(tmp_path / "report.json")])
    found = json.loads((tmp_path / "report.json").read_text())["commands"]
    assert found["kdrl"]["ratio"]["median"] > 1
    assert "| `kdrl` |" in capsys.readouterr().out
