"""What each optimisation of the in-process engine is worth: tokens per second with it on and off.

    python benchmarks/rollout.py [--rows 64] [--rounds 5] [--out FILE]

A random Llama of 2 M parameters, groups of 8 after prompts of 8 to 24 tokens, completions of very uneven length: a bias
on the end token makes them geometric with a mean of 80, cut off at 256. Seconds are CPU seconds of one thread; variants
take turns, and a ratio is the median over the rounds of two runs of one round. All variants but bfloat16 must sample
the same tokens, which is checked first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.rollout.engine import Completions
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.streams import group_keys

VOCABULARY, HIDDEN, END = 8192, 96, 2
GROUP, MEAN_TOKENS, MAX_TOKENS = 8, 80, 256

Variant = Callable[[], Completions]


def make_student() -> LanguageModel:
    """The model, whose end token has a probability of about 1 / MEAN_TOKENS everywhere."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config).eval()
    head = nn.Linear(HIDDEN, VOCABULARY)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[END] = torch.tensor(VOCABULARY / MEAN_TOKENS).log()
    model.lm_head = head
    return LanguageModel(model, VOCABULARY)


def variants(student: LanguageModel, rows: int) -> dict[str, tuple[str, Variant]]:
    """Name -> (name of the variant it is compared with, the rollout)."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 25, (rows // GROUP,), generator=generator).tolist()
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    keys = group_keys(0, 0, [str(number) for number in range(len(prompts))], [0] * len(prompts), GROUP)

    def rollout(shared: bool = True, **settings) -> Variant:
        def run() -> Completions:
            engine = InProcessEngine(**settings)
            engine.sync(student, [END])
            if shared:
                return engine.generate(prompts, GROUP, Sampling(max_tokens=MAX_TOKENS), keys)
            return engine.generate(
                [prompt for prompt in prompts for _ in range(GROUP)], 1, Sampling(max_tokens=MAX_TOKENS), keys
            )

        return run

    def transformers_cache() -> Completions:
        with mock.patch("kdrl_pl.rollout.kv_cache.growing_cache", lambda config: DynamicCache(config=config)):
            return rollout()()

    few = rows // 4
    return {
        "all on": ("all on", rollout()),
        "a prompt read once per row": ("all on", rollout(shared=False)),
        "finished rows stay": ("all on", rollout(compact_at=1.0)),
        "finished rows leave at once": ("all on", rollout(compact_at=1e-6)),
        "transformers' cache": ("all on", transformers_cache),
        "bfloat16": ("all on", rollout(dtype="bfloat16")),
        f"{few} rows at a time": ("all on", rollout(max_rows=few)),
        f"{few} rows at a time, no refill": (f"{few} rows at a time", rollout(max_rows=few, refill=False)),
    }


def seconds(run: Variant) -> float:
    """CPU seconds of one rollout."""
    started = time.process_time()
    run()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    student = make_student()
    runs = variants(student, arguments.rows)

    reference, tokens = runs["all on"][1](), {}
    for name, (_, run) in runs.items():
        done = run()
        tokens[name] = sum(map(len, done.token_ids))
        other = sum(one != two for one, two in zip(done.token_ids, reference.token_ids, strict=True))
        if other > arguments.rows // 50 and name != "bfloat16":  # a draw within rounding of an edge may go either way
            raise SystemExit(f"{name}: {other} of {arguments.rows} rows differ")
    lengths = sorted(map(len, reference.token_ids))
    parameters = sum(parameter.numel() for parameter in student.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, {arguments.rows} rows, lengths {lengths[0]} to {lengths[-1]}, ", end=""
    )
    print(f"median {lengths[len(lengths) // 2]}, one thread")

    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, (_, run) in runs.items():
            rates[name].append(tokens[name] / seconds(run))
    results = {}
    print(f"{'':32}{'tokens/s':>9}  ratio [least, most]")
    for name, (base, _) in runs.items():
        ratios = sorted(one / two for one, two in zip(rates[name], rates[base], strict=True))
        rate, ratio = statistics.median(rates[name]), statistics.median(ratios)
        results[name] = {"tokens_per_s": rate, "compared_with": base, "ratio": ratio, "range": [ratios[0], ratios[-1]]}
        print(f"{name:32}{rate:9.0f}  {ratio:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] of {base}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
