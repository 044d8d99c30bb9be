"""Fresh processes and their memory."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ECHO = """
import json, os, sys
if "fail" in sys.argv: sys.exit("no such luck")
open(sys.argv[-1], "w").write(json.dumps([sys.argv[1], os.environ["OMP_NUM_THREADS"], sys.path[1]]))
"""


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("common.processes")


def test_a_process_hands_back_json(processes, tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    assert processes.run_json([str(script), "x"], threads=3, python_path="/some/folder") == ["x", "3", "/some/folder"]
    with pytest.raises(RuntimeError, match="no such luck"):
        processes.run_json([str(script), "fail"], threads=1)


def test_peak_memory_is_what_was_held_at_most_and_not_what_came_before(processes):
    before = bytearray(b"x" * 80_000_000)
    memory = processes.PeakMemory()
    held = bytearray(b"x" * 40_000_000)  # b"x" * n and the copy of it: 80 MB at once
    del held
    assert 75 < memory.mb() < 90
    assert len(before) == 80_000_000
    assert processes.PeakMemory().mb() < 5


def test_processor_time_is_the_commands_own(processes):
    idle, wall = processes.processor_seconds([sys.executable, "-c", "import time; time.sleep(0.5)"])
    assert wall >= 0.5 > idle
    with pytest.raises(RuntimeError, match="oh no"):
        processes.processor_seconds([sys.executable, "-c", "raise SystemExit('oh no')"])
