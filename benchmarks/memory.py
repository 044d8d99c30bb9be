"""Memory of scoring and of the update with a wide vocabulary: ours, TRL's, and with plain logits.

    python benchmarks/memory.py [--repeats 1] [--threads 2] [--output FILE]

Workload d (151,936 words) and the same with twice the vocabulary. Every figure is the peak of a fresh process minus
what every form has to keep: the weights, which it held before the phase began, and in the update their gradients, which
arise in it. TRL is in the extra `bench`, or anywhere else (`--trl-path`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.markdown import memory_table
from common.processes import MB, PeakMemory, run_json, save, spread
from common.workloads import Workload, choose, write_models

FORMS = ("kdrl_pl", "trl", "plain")
PHASES = ("score", "update")


def ours(workload: Workload, folder: Path) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """The student, one pass without gradient over all rows, and one with."""
    from common import kdrl_side

    module = kdrl_side.make_module(folder, grpo=True).load()
    rows = module.score(kdrl_side.load_rows(module, workload))
    return module.student, lambda: module.student_logprobs(rows), lambda: module.loss(rows).loss.backward()


def trl(workload: Workload, folder: Path) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """The same of TRL's GRPOTrainer."""
    import torch
    from common import trl_side

    trainer, _, _ = trl_side.make_trainer(workload, folder, 1)
    numbers = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, workload.vocabulary - 1, (count,), generator=numbers).tolist()

    prompts = [ids(workload.prompt_tokens) for _ in range(workload.prompts) for _ in range(workload.group)]
    batch = trl_side.prepare(trainer, prompts, [ids(length) for length in workload.lengths(1)])
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]

    def score() -> None:
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(trainer.model, tokens, mask, width)

    return trainer.model, score, lambda: trainer._compute_loss(trainer.model, batch).backward()


def plain(workload: Workload, folder: Path) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """The same with the logits of all response tokens, as anyone writes it first."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    width = workload.response_tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        1, workload.vocabulary - 1, (workload.rows, workload.prompt_tokens + width), generator=generator
    )

    def logprobs() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, ids[:, -width:, None])

    def score() -> None:
        with torch.no_grad():
            logprobs()

    return model, score, lambda: logprobs().mean().backward()


def measure(form: str, phase: str, workload: Workload) -> dict[str, float]:
    """Peak of one phase in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(workload, folder)
        model, score, update = {"kdrl_pl": ours, "trl": trl, "plain": plain}[form](workload, folder)
        weights = list(model.parameters())
        for weight in weights:
            weight.detach().sum()  # pages of a mapped file are not there until read
        memory = PeakMemory()
        (score if phase == "score" else update)()
        gradients = sum(weight.grad.nbytes for weight in weights if weight.grad is not None) / MB
        return {"peak_mb": memory.mb() - gradients, "head_mb": workload.vocabulary * workload.student.hidden * 4 / MB}


def main(arguments: list[str] | None = None) -> None:
    """Command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1, help="processes per figure")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forms", default=",".join(FORMS), help="comma between: " + ", ".join(FORMS))
    parser.add_argument("--phases", default=",".join(PHASES), help="comma between: " + ", ".join(PHASES))
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--trl-path", default=os.environ.get("TRL_PATH"), help="folder TRL 1.16.0 was installed into")
    parser.add_argument("--miniature", action="store_true", help="tiny sizes, to see that it works")
    for internal in ("--vocabulary", "--json"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    workload = choose("d", options.miniature)["d"]
    if options.json:
        import torch

        torch.set_num_threads(options.threads)
        result = measure(options.forms, options.phases, replace(workload, vocabulary=int(options.vocabulary)))
        Path(options.json).write_text(json.dumps(result))
        return
    from common.machine import description

    rows = []
    for phase in options.phases.split(","):
        for vocabulary in (workload.vocabulary, 2 * workload.vocabulary):
            row: dict[str, Any] = {"phase": phase, "vocabulary": vocabulary}
            for form in options.forms.split(","):
                job = [__file__, "--forms", form, "--phases", phase, "--vocabulary", str(vocabulary)]
                job += ["--threads", str(options.threads), *(["--miniature"] if options.miniature else [])]
                path = options.trl_path if form == "trl" else None
                results = [run_json(job, options.threads, path) for _ in range(options.repeats)]
                row[form], row["head_mb"] = spread([r["peak_mb"] for r in results]), results[0]["head_mb"]
            rows.append(row)
    report = {"machine": {**description(), "threads": options.threads}, "rows": rows}
    save(report, options.output)
    print(memory_table(report))


if __name__ == "__main__":
    main()
