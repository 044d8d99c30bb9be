"""What it costs that a teacher is behind HTTP: the same rows by FrozenTeacher in this process and by RemoteTeacher.

python benchmarks/served_teacher.py --model checkpoints/testbeds/arithmetic/teacher

Server and client share this machine; a network adds its own time. The difference is JSON, sockets, LitServe's
queues between its processes, and base64.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import torch

from kdrl_pl.experience import Experience
from kdrl_pl.models.loading import load_tokenizer, vocabulary_size
from kdrl_pl.teacher import FrozenTeacher, RemoteTeacher

SIZES = ((4, 32, 16), (64, 32, 16), (64, 128, 128), (256, 128, 128))  # rows, prompt tokens, response tokens


def rows(number: int, prompt: int, response: int, words: int) -> Experience:
    """Groups of 8 random rows."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, words, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(prompt) for _ in range((number + 7) // 8)]
    group = [row // 8 for row in range(number)]
    return Experience.from_rows([prompts[g] for g in group], [draw(response) for _ in group], [0.0] * number, group)


def milliseconds(teachers: tuple[FrozenTeacher, ...], experience: Experience, repeats: int) -> list[float]:
    """Per teacher the shortest of `repeats` calls, taken in turns: what other work on the machine disturbs least."""
    shortest = [float("inf")] * len(teachers)
    for _ in range(repeats + 1):
        for i, teacher in enumerate(teachers):
            started = time.perf_counter()
            teacher.score(experience, experience.response_mask)
            shortest[i] = min(shortest[i], 1000 * (time.perf_counter() - started))
    return shortest


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the teacher")
    parser.add_argument("--port", type=int, default=18765)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes, the smallest first")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "kdrl_pl", "serve-teacher", "--model", options.model, "--port", str(options.port)]
    server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        tokenizer = load_tokenizer(options.model)
        here, there = FrozenTeacher(options.model), RemoteTeacher(f"http://127.0.0.1:{options.port}", patience=120)
        for teacher in (here, there):
            teacher.load("cpu", tokenizer)
        print(
            "| rows | prompt | response | this process, ms | served, ms | difference, ms |\n|---|---|---|---|---|---|"
        )
        for size in SIZES[: options.sizes]:
            experience = rows(*size, vocabulary_size(tokenizer))
            times = milliseconds((here, there), experience, options.repeats)
            print("|", " | ".join(map(str, size)), f"| {times[0]:.1f} | {times[1]:.1f} | {times[1] - times[0]:.1f} |")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
