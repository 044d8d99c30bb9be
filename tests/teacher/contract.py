"""What every teacher promises, whatever holds the model: one list of factories, one suite (test_contract.py).

A factory gets the folder of a model and returns a teacher that is not loaded. Add a teacher by a line of `FACTORIES`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kdrl_pl.experience import Experience
from kdrl_pl.models.tiny import write_tiny
from kdrl_pl.teacher import FrozenTeacher, RemoteTeacher, RoutedTeacher, TeacherCache

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-tests"


def rows(temperature: float = 0.7, **fields) -> Experience:
    """Four ragged rows of two groups in the vocabulary of the tiny models (16 ids); 1 and 14 may end a response."""
    return Experience.from_rows(
        prompts=[[3, 4, 12], [3, 4, 12], [5, 6, 7, 12], [5, 6, 7, 12]],
        responses=[[8, 9, 1], [2, 3, 4, 5, 9, 11, 1], [6], [7, 7, 8, 14]],
        rewards=[1.0, 0.0, 0.0, 1.0],
        group=[0, 0, 1, 1],
        temperature=temperature,
        **fields,
    )


def sure_model(folder: Path, layers: int = 2) -> Path:
    """A random teacher, 128 wide, whose head is eight times as sure: as it is made, it hardly prefers any word."""
    write_tiny(folder, 128, layers)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def widened(source: str, target: Path, more: int, scale: float = 0.0) -> str:
    """The same model with `more` rows beyond the tokenizer's ids: random ones so large, or zeros."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["vocab_size"] += more
    (target / "config.json").write_text(json.dumps(config))
    weights = load_file(target / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = scale * torch.randn(more, weights[name].shape[1], generator=torch.Generator().manual_seed(0))
        weights[name] = torch.cat([weights[name], extra])
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class ServedTeacher:
    """`kdrl serve-teacher` as a process of its own, with all that it starts.

    Args:
        model: folder.
        options: further ones of the command.
        port: null takes a free one.
        token: null lets everyone ask.
    """

    def __init__(self, model: str, *options: object, port: int | None = None, token: str | None = TOKEN) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = token
        environment = {k: v for k, v in os.environ.items() if k != "KDRL_TEACHER_TOKEN"}
        environment |= {"OMP_NUM_THREADS": "1"} | ({} if token is None else {"KDRL_TEACHER_TOKEN": token})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kdrl_pl", "serve-teacher", "--model", model, "--port", str(self.port)]
            + [str(option) for option in options],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Status and body of one request, with the token unless `headers` has another one."""
        if self.token is not None:
            headers = {"Authorization": f"Bearer {self.token}", **headers}
        headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait(self, seconds: float = 120) -> ServedTeacher:
        """Until it answers."""
        until = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < until, "the server never answered"
            try:
                if self.ask("/health")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.1)

    def kill(self) -> None:
        """As the kernel does it: nobody tidies up."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def stop(self, seconds: float = 30) -> str:
        """As an operator does it; what it printed."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.communicate(timeout=seconds)[0] or ""
        except ValueError:  # its output was read before
            return ""
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


class Servers:
    """One server per model and precision, started when it is first needed, for a whole test session."""

    def __init__(self, token_file: Path) -> None:
        self.token_file = token_file
        token_file.write_text(TOKEN + "\n")
        self.servers: dict[tuple, ServedTeacher] = {}

    def teacher(self, model: str, *options: object) -> RemoteTeacher:
        server = self.servers.get((model, *options))
        if server is None:
            server = self.servers[(model, *options)] = ServedTeacher(model, *options)
        server.wait()
        return RemoteTeacher(server.url, str(self.token_file), patience=30, max_tokens_per_request=24)

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()


Factory = Callable[[str, Servers], FrozenTeacher]

PRECISIONS: dict[str, dict] = {"fp32": {}, "8bit": {"quantization": "8bit"}, "4bit": {"quantization": "4bit"}}
AND_BF16 = {**PRECISIONS, "bf16": {"dtype": "bfloat16"}}  # whose rounding the rows beside a row move: not in the suite

# name -> (makes the teacher, precision of the model in this process that it is compared with)
FACTORIES: dict[str, tuple[Factory, str]] = {
    **{name: (lambda path, _, s=settings: FrozenTeacher(path, **s), name) for name, settings in PRECISIONS.items()},
    "offloaded": (lambda path, _: FrozenTeacher(path, offload=True), "fp32"),
    "sharded": (lambda path, _: FrozenTeacher(path, sharded=True), "fp32"),
    "cached": (lambda path, _: FrozenTeacher(path, cache=TeacherCache(f"{path}-cache")), "fp32"),
    "cached 8bit": (
        lambda path, _: FrozenTeacher(path, quantization="8bit", cache=TeacherCache(f"{path}-cache")),
        "8bit",
    ),
    "routed": (lambda path, _: RoutedTeacher({"one": FrozenTeacher(path)}, "one"), "fp32"),
    "remote": (lambda path, servers: servers.teacher(path), "fp32"),
}
