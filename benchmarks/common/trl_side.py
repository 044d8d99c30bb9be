"""TRL's side: real steps of `GRPOTrainer.train`, the teacher in place of its reference model.

Written against TRL 1.16.0. Its settings are its defaults but for what must be equal on both sides: fp32 unless the
workload says otherwise, no gradient checkpointing (ours is off too), all rows in one pass, no logging.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from common.kdrl_side import COEF, EPS, PHASES
from common.processes import PeakMemory
from common.workloads import Workload, prompt_texts, write_models

assert EPS == 1e-4  # a constant of TRL's source


def alternating(completions: list[str], **_: Any) -> list[float]:
    """The reward of our side."""
    return [float(row % 2) for row in range(len(completions))]


class EndTable(LogitsProcessor):
    """Forces response lengths: the end token is impossible before a row's last step and certain at it.

    Args:
        end: id of the end token.
    """

    def __init__(self, end: int) -> None:
        self.end = end
        self.last: list[list[int]] = []  # step -> rows that end there

    def begin(self, lengths: list[int], budget: int) -> None:
        """A rollout begins; a row of full length needs no end token."""
        self.step = 0
        self.last = [[row for row, n in enumerate(lengths) if n - 1 == step and n < budget] for step in range(budget)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.end] = -torch.inf
        if rows := self.last[self.step]:
            scores[rows] = -torch.inf
            scores[rows, self.end] = 0.0
        self.step += 1
        return scores


class TimedTrainer(GRPOTrainer):
    """Adds up where the time of a step goes; the work is TRL's own."""

    seconds: dict[str, float]

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        with self._clock("rollout"):
            return super()._generate_single_turn(*arguments, **named)

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(model, *arguments, **named)
        with self._clock("teacher" if model is self.ref_model else "score"):
            return super()._get_per_token_logps_and_entropies(model, *arguments, **named)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        prepared = super()._prepare_inputs(generation_batch)
        self.update_started = time.perf_counter()
        return prepared


class Steps(TrainerCallback):
    """Begins and ends the clock of a step.

    Args:
        workload: its table of lengths.
        table: told of it.
    """

    trainer: TimedTrainer

    def __init__(self, workload: Workload, table: EndTable) -> None:
        self.workload, self.table = workload, table
        self.steps: list[dict[str, float]] = []

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        self.memory = PeakMemory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.table.begin(self.workload.lengths(state.global_step), self.workload.response_tokens)
        self.trainer.seconds = dict.fromkeys(PHASES, 0.0)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        now = time.perf_counter()
        took = {**self.trainer.seconds, "update": now - self.trainer.update_started, "step": now - self.started}
        mask = self.trainer._buffered_inputs[0]["completion_mask"]
        if sorted(mask.sum(1).tolist()) != sorted(self.workload.lengths(state.global_step - 1)):  # TRL shuffles rows
            raise RuntimeError(f"responses of {mask.sum(1).tolist()} tokens; the workload has others")
        if state.global_step > 1:  # the first is the warm-up
            self.steps.append(took)


def make_trainer(workload: Workload, folder: Path, steps: int) -> tuple[TimedTrainer, Steps, EndTable]:
    """The trainer with our models, prompts and lengths."""
    words = AutoTokenizer.from_pretrained(folder / "student")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    grpo_trainer.create_model_from_path = lambda *_, **__: teacher  # the one place where it loads its reference model
    is_bf16 = workload.precision == "bf16-mixed"
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=workload.rows,
        num_generations=workload.group,
        max_completion_length=workload.response_tokens,
        max_steps=steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=COEF,
        loss_type="dapo",
        gradient_checkpointing=False,
        bf16=is_bf16,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    table = EndTable(words.eos_token_id)
    clock = Steps(workload, table)
    trainer = TimedTrainer(
        model=student,
        reward_funcs=alternating,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompt_texts(workload, steps)}),
        processing_class=words,
        callbacks=[clock],
    )
    generate = student.generate
    student.generate = lambda **named: generate(**named, logits_processor=LogitsProcessorList([table]))
    clock.trainer = trainer
    trainer.seconds = dict.fromkeys(PHASES, 0.0)
    return trainer, clock, table


def run(workload: Workload) -> dict[str, Any]:
    """See `common.kdrl_side.run`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(workload, folder)
        trainer, clock, _ = make_trainer(workload, folder, workload.steps + 1)
        trainer.train()
    return {"steps": clock.steps, "peak_mb": clock.memory.mb()}


def prepare(trainer: TimedTrainer, prompts: list[list[int]], responses: list[list[int]]) -> dict[str, Any]:
    """TRL's own batch of given rows: padding, advantages, log-probs of the reference model."""
    words = trainer.processing_class
    trainer._generate_single_turn = lambda *_, **__: (responses, None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": words.decode(ids)} for ids in prompts])


def agreement(workload: Workload, folder: Path, prompts: list[list[int]], responses: list[list[int]]) -> dict[str, Any]:
    """See `common.kdrl_side.agreement`."""
    trainer, _, _ = make_trainer(workload, folder, 1)
    batch = prepare(trainer, prompts, responses)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    kl = trainer._metrics["train"]["kl"][-1]
    return {
        "policy_loss": float(loss.detach()) - COEF * kl,
        "kl": kl,
        "gradient": {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()},
    }
