"""Fresh processes, and how much memory and processor time they took."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MB = 1e6


class PeakMemory:
    """How far the memory of this process rises above what it is now; Linux only (it resets the kernel's high mark)."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed already is not to hide what comes
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _kilobytes("VmRSS")

    def mb(self) -> float:
        """Highest resident memory since, minus resident memory then, in MB."""
        return max(_kilobytes("VmHWM") - self.before, 0) * 1024 / MB


def _kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def run_json(arguments: Sequence[str], threads: int, python_path: str | None = None) -> Any:
    """Run `python ARGUMENTS` in a fresh process and return the JSON that it writes to the file named last.

    Args:
        arguments: script and options; the file to write is appended as `--json FILE`.
        threads: of torch.
        python_path: folder put in front of the module search path.

    Raises:
        RuntimeError: the process failed; the message ends with what it said.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if python_path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [python_path, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, *arguments, "--json", str(file)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode or not file.is_file():
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{ran.stdout[-2000:]}{ran.stderr[-4000:]}")
        return json.loads(file.read_text())


def processor_seconds(command: Sequence[str]) -> tuple[float, float]:
    """Processor time (all threads) and wall clock of a command, in seconds.

    Raises:
        RuntimeError: it failed.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), os.times().elapsed
    ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), os.times().elapsed - started
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr[-4000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def save(report: dict[str, Any], path: Path | None) -> None:
    """Write a report as JSON, if a file is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
