"""The machine: versions, devices, threads, disk. Needs no config."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from kdrl_pl.doctor.findings import Finding, fail, ok, warn

_LIGHTNING = (2, 6, 6)  # before it: malicious or with a code-execution CVE, see pyproject.toml
_ROOM = 5e9  # bytes below which a run of a real model soon has no room


def machine(folder: str | Path = "runs") -> Iterator[Finding]:
    """Look at the machine.

    Args:
        folder: where runs would go.
    """
    yield _versions()
    yield _devices()
    yield _threads()
    yield _disk(Path(folder))


def _versions() -> Finding:
    names = ("kdrl_pl", "torch", "lightning", "transformers")
    text = f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {metadata.version(name)}" for name in names)
    found = tuple(int(part) for part in metadata.version("lightning").split(".")[:3] if part.isdigit())
    if found < _LIGHTNING:
        return fail("versions", text, "pip install 'lightning>=2.6.6,<3': older ones are unsafe")
    return ok("versions", text)


def _devices() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return ok("devices", "no CUDA device: the CPU, which suits models of some 100 M parameters")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    text = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in names)
    free, total = torch.cuda.mem_get_info()
    if free < 0.8 * total:
        cure = "end what else runs on it (nvidia-smi lists it)"
        return warn("devices", f"{text}; only {free / 2**30:.0f} GiB of the first are free", cure)
    return ok("devices", text)


def _threads() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, load = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    text = f"{cores} cores, {threads} threads of torch, load {load:.1f}"
    if threads > cores:
        return warn("threads", text, f"set OMP_NUM_THREADS={cores}: threads that wait for each other's core are slow")
    if load > cores + 1:
        return warn("threads", text, "other work shares these cores: a run on the CPU will be several times slower")
    return ok("threads", text)


def _disk(folder: Path) -> Finding:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free for {folder}"
    if not os.access(place, os.W_OK):
        return fail("disk", f"{place} cannot be written to", "choose another folder with --run.root")
    if free < _ROOM:
        return warn("disk", text, "a checkpoint takes 12 bytes per parameter, and two are kept; make room")
    return ok("disk", text)
