"""What one GPU does with a KDRL step: correctness first, then tokens per second of each phase beside the card's limits.

    python benchmarks/gpu.py [--out FILE]

Self-contained: random weights of real shapes (0.5 B student, 1.5 B teacher, 151,936 words), no data set, no hub.
Prints a table and writes it as JSON. Every share is against this card's own measured matrix-product rate or copy
bandwidth, in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from common.machine import copy_rate, product_rate
from common.machine import seconds as seconds_on
from transformers import Qwen2Config, Qwen2ForCausalLM

from kdrl_pl.experience import Experience
from kdrl_pl.losses import Distillation, PolicyGradient
from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.module import KDRLModule
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.streams import group_keys
from kdrl_pl.teacher import FrozenTeacher

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads: Qwen2.5's
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
}
VOCABULARY = 151_936
PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 8, 256, 256


def model(shape: str, dtype: torch.dtype, device: str, vocabulary: int = VOCABULARY) -> LanguageModel:
    """Random weights of one of `SHAPES`."""
    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LanguageModel(Qwen2ForCausalLM(config).to(dtype), vocabulary)


def teacher_of(frozen: LanguageModel) -> FrozenTeacher:
    """A teacher that is in memory already."""
    teacher = FrozenTeacher("in memory")
    teacher.model = frozen.eval().requires_grad_(False)
    return teacher


def module_of(student: LanguageModel, teacher: FrozenTeacher, **settings) -> KDRLModule:
    """A module around models in memory."""
    module = KDRLModule("in memory", teacher, PolicyGradient(), Distillation(coef=2e-3), **settings)
    module.student = student.train()
    module.stop_cell = ()  # there is no tokenizer to name end tokens
    return module


def sample(student: LanguageModel, device: str, tokens: int, prompts: int = PROMPTS) -> Experience:
    """One rollout by the in-process engine, no stop token, random rewards."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, student.vocab_size, (prompts, PROMPT_TOKENS), generator=generator).tolist()
    keys = group_keys(0, 0, [str(i) for i in range(prompts)], [0] * prompts, GROUP)
    engine = InProcessEngine()
    engine.sync(student, [])
    done = engine.generate(ids, GROUP, Sampling(max_tokens=tokens), keys)
    rows = prompts * GROUP
    rewards = torch.rand(rows, generator=generator)
    return Experience.from_rows(
        [ids[row // GROUP] for row in range(rows)],
        done.token_ids,
        rewards,
        [row // GROUP for row in range(rows)],
        behavior_logprobs=done.logprobs,
        max_response_tokens=tokens,
    ).to(device)


def seconds(work: Callable[[], object]) -> float:
    """Median wall-clock seconds on the card."""
    return seconds_on(work, "cuda")


def ceilings() -> dict[str, float]:
    """Measured bf16 matrix-product rate (TFLOP/s) and copy bandwidth (TB/s, bytes read plus written)."""
    product = product_rate("cuda", torch.bfloat16, 8192, times=10)
    return {"tflops": product / 1e12, "tb_per_s": copy_rate("cuda", 1 << 30, times=10) / 1e12}


def correctness() -> dict[str, float]:
    """Loss and gradient on the card against the CPU in fp32, and the sampler against the trainer."""
    relative = {}
    results = {}
    experience = sample(model_small(0, "cpu"), "cpu", 32, prompts=4)
    for device in ("cpu", "cuda"):
        student, frozen = model_small(0, device), model_small(1, device)
        module = module_of(student, teacher_of(frozen))
        rows = experience[list(range(len(experience)))].to(device)
        module.score(rows)
        output = module.loss(rows)
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten().cpu().double() for p in student.parameters()])
        results[device] = (float(output.loss.detach()), gradient)
        drift = (output.logprobs - rows.behavior_logprobs).abs()[rows.response_mask]
        relative[f"sampled on the CPU, scored on {device}: largest log-prob difference, nats"] = float(drift.max())
    (loss_cpu, g_cpu), (loss_gpu, g_gpu) = results["cpu"], results["cuda"]
    relative["loss, relative difference"] = abs(loss_cpu - loss_gpu) / abs(loss_cpu)
    relative["gradient, relative norm of the difference"] = float((g_cpu - g_gpu).norm() / g_cpu.norm())
    student = model_small(0, "cuda")
    rows = sample(student, "cuda", 64, prompts=4)
    drift = (student.token_logprobs(rows.input_ids, rows.response_mask).logprobs - rows.behavior_logprobs).abs()
    relative["sampled and scored on cuda, fp32: largest difference, nats"] = float(drift[rows.response_mask].max())
    return relative


def model_small(seed: int, device: str) -> LanguageModel:
    """A 4-layer model in fp32, the same on every device."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        initializer_range=0.2,
    )
    return LanguageModel(Qwen2ForCausalLM(config), 2048).to(device)


def phases(limit: dict[str, float]) -> list[dict[str, float | str]]:
    """Seconds, tokens per second and share of the card's limit of rollout, teacher and update."""
    autocast = torch.autocast("cuda", torch.bfloat16)
    student, frozen = model("0.5B", torch.float32, "cuda"), model("1.5B", torch.bfloat16, "cuda")
    module = module_of(student, teacher_of(frozen), max_tokens_per_micro_batch=32768)
    module.teacher.max_tokens_per_micro_batch = 65536
    rows = PROMPTS * GROUP
    read, sampled = rows * (PROMPT_TOKENS + RESPONSE_TOKENS), rows * RESPONSE_TOKENS
    student_size = sum(p.numel() for p in student.parameters())
    teacher_size = sum(p.numel() for p in frozen.parameters())
    with autocast:
        experience = sample(student, "cuda", RESPONSE_TOKENS)
        module.score(experience)
        rollout = seconds(lambda: sample(student, "cuda", RESPONSE_TOKENS))
        teacher = seconds(lambda: module.teacher.score(experience, experience.response_mask))
        score = seconds(lambda: module.student_logprobs(experience))

        def update() -> None:
            for part in module.micro_batch_rows(experience):
                module.loss(experience[part]).loss.backward()
            student.zero_grad()

        update_seconds = seconds(update)
    # least work: every token through every weight, 2 operations each, 3 times that with the backward pass;
    # decoding reads the (bf16) weights once per step
    flops = {"teacher": 2 * teacher_size * read, "score": 2 * student_size * read, "update": 6 * student_size * read}
    table: list[dict[str, float | str]] = []
    least = 2 * student_size * RESPONSE_TOKENS / (limit["tb_per_s"] * 1e12)
    table.append(_row("rollout", rollout, sampled, least, "weights read once per step"))
    for name, took in (("teacher", teacher), ("score", score), ("update", update_seconds)):
        table.append(_row(name, took, read, flops[name] / (limit["tflops"] * 1e12), "matrix products"))
    return table


def _row(name: str, took: float, tokens: int, least: float, bound: str) -> dict[str, float | str]:
    return {
        "phase": name,
        "seconds": took,
        "tokens_per_s": tokens / took,
        "least_seconds": least,
        "share_of_limit": least / took,
        "limit": bound,
    }


def main() -> None:
    """Run all and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "correctness": correctness()}
    print(f"{report['card']}, torch {report['torch']}")
    for name, value in report["correctness"].items():
        print(f"  {name}: {value:.2e}")
    report["ceilings"] = ceilings()
    print(f"  {report['ceilings']['tflops']:.0f} TFLOP/s bf16, {report['ceilings']['tb_per_s']:.2f} TB/s copy")
    report["phases"] = phases(report["ceilings"])
    report["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    report["sizes"] = {
        "prompts": PROMPTS,
        "group": GROUP,
        "prompt_tokens": PROMPT_TOKENS,
        "response_tokens": RESPONSE_TOKENS,
        "student": "0.5B",
        "teacher": "1.5B",
    }
    for row in report["phases"]:
        print(
            f"  {row['phase']:8} {row['seconds']:7.2f} s {row['tokens_per_s']:10.0f} tokens/s"
            f" {row['share_of_limit']:6.1%} of the limit ({row['limit']})"
        )
    print(f"  peak memory {report['peak_gib']:.1f} GiB")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
