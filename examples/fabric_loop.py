"""KDRL in a plain Lightning Fabric loop: objective, teacher, rollouts, rewards of the quick start, without a Trainer.

    python examples/fabric_loop.py --rollouts 20
    python examples/fabric_loop.py --rollouts 20 --devices 2

It prints a line per rollout, with the losses that `kdrl fit --config configs/quickstart.yaml` logs. That command adds
validation, checkpoints that resume bit for bit, signals and a run folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from lightning.fabric import Fabric

from kdrl_pl import Distillation, Experience, FrozenTeacher, KDRLModule, Sampling
from kdrl_pl.data.loaders import RolloutLoader
from kdrl_pl.data.loading import SetConfig, load_prompts
from kdrl_pl.data.sampler import PromptSampler
from kdrl_pl.models.loading import load_tokenizer
from kdrl_pl.optim import clip_gradients, make_optimizer
from kdrl_pl.parallel import all_reduce_sum
from kdrl_pl.rewards import TaskReward
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sample import sample_experience
from kdrl_pl.schedules import Linear
from kdrl_pl.updates import weightless

STUDENT, TEACHER = "checkpoints/testbeds/arithmetic/student", "checkpoints/testbeds/arithmetic/teacher"


def train(
    fabric: Fabric, rollouts: int, prompts: int = 32, seed: int = 0
) -> Iterator[tuple[Experience, dict[str, float]]]:
    """Per rollout this rank's rows; and mean reward, loss and norm of the gradient over all ranks."""
    module = KDRLModule(
        STUDENT,
        FrozenTeacher(TEACHER),
        distillation=Distillation(
            estimator="full",
            mask="response",
            rows_without_signal=0.125,
            coef=Linear(start=0.3, slope=0.0025, floor=0.0),
        ),
        normaliser="token",
    )
    module.load(fabric.device)
    make = partial(torch.optim.AdamW, lr=6e-4, betas=(0.9, 0.99), weight_decay=0.0)
    model, optimizer = fabric.setup(module, make_optimizer(make, module.student))
    model.mark_forward_method("loss")  # so that a call of it goes through DDP

    tokenizer = load_tokenizer(STUDENT)
    addition = SetConfig(source="addition", size=4096, options={"digits": 3})
    questions, _ = load_prompts("addition", addition, tokenizer, max_prompt_tokens=16)
    sampler = PromptSampler({"addition": len(questions)}, None, prompts, seed, fabric.world_size)
    loader = RolloutLoader({"addition": questions}, sampler, rank=fabric.global_rank, world_size=fabric.world_size)
    engine, reward = InProcessEngine(), TaskReward()

    for k in range(rollouts):
        batch = loader.batch(k)  # this rank's prompts
        rows = sample_experience(
            batch,
            module.student,
            tokenizer,
            engine,
            reward,
            samples=8,
            sampling=Sampling(max_tokens=40),
            seed=seed,
            number=k,
            device=fabric.device,
        )
        module.score(rows, k)  # advantages, weights over the whole update, the teacher's log-probs
        loss, norm = update(fabric, model, module, optimizer, rows, k)
        reward_mean = float(all_reduce_sum(rows.rewards.mean())) / fabric.world_size  # ranks have equally many rows
        yield rows, {"rollout": k, "reward": reward_mean, "loss": loss, "grad_norm": norm}


def update(
    fabric: Fabric, model: object, module: KDRLModule, optimizer: object, rows: Experience, k: int
) -> tuple[float, float]:
    """One optimizer step on the rows of a rollout, in micro-batches; the loss, and the norm of its gradient."""
    module.prepare(rows, k)  # for terms that look at all rows of an update at once; here there are none
    movable = rows[module.objective.active(rows, k)]  # no term can move the others
    passes = module.micro_batch_rows(movable)  # as many on every rank
    total = torch.zeros((), device=fabric.device)
    if not passes:
        return 0.0, 0.0  # AdamW would move the weights even so
    for number, index in enumerate(passes):
        part = movable[index] if index else weightless(rows[:1])  # an idle rank keeps in step
        with fabric.no_backward_sync(model, enabled=number < len(passes) - 1):
            loss = model.loss(part, k).loss  # weights are normalised over the update: its losses add up
            fabric.backward(loss * fabric.world_size)  # DDP takes the mean over ranks, and the sum is wanted
        total += loss.detach()
    norm = clip_gradients(module.student, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(all_reduce_sum(total)), float(norm)


def main() -> None:
    """Parse the command line and print what `train` yields."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=32, help="per rollout, over all processes")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    options = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=options.devices, strategy="ddp" if options.devices > 1 else "auto")
    fabric.launch()
    for _, row in train(fabric, options.rollouts, options.prompts):
        fabric.print("  ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
