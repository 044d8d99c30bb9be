"""What this machine is, and what it can do at most: rate of matrix products, copy bandwidth."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPEATS = 3


def seconds(work: Callable[[], object], device: str = "cpu", repeats: int = REPEATS) -> float:
    """Median wall-clock seconds of `work`, device finished, one warm-up."""
    times = []
    for i in range(repeats + 1):
        _finish(device)
        start = time.perf_counter()
        work()
        _finish(device)
        if i:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def product_rate(device: str, dtype: torch.dtype, size: int, times: int = 3) -> float:
    """Operations per second of size x size matrix products, two per multiply-add."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    took = seconds(lambda: [a @ a for _ in range(times)], device) / times
    return 2 * size**3 / took


def copy_rate(device: str, numbers: int, times: int = 3) -> float:
    """Bytes read plus bytes written per second by a copy of `numbers` bf16 numbers."""
    x = torch.randn(numbers, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    took = seconds(lambda: [y.copy_(x) for _ in range(times)], device) / times
    return 2 * x.numel() * x.element_size() / took


def description() -> dict[str, Any]:
    """Processor, threads and versions, to stand beside figures."""
    from importlib.metadata import version

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
