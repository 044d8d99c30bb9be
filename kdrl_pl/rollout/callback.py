"""RolloutCallback: samples a group of responses to every prompt of a batch and judges them.

Every hook is one line; the ten lines where a rollout happens are `rollout`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from kdrl_pl import phases, signals
from kdrl_pl.data.prompts import Prompt, PromptBatch
from kdrl_pl.errors import RunError
from kdrl_pl.experience import Experience
from kdrl_pl.models.loading import stop_ids
from kdrl_pl.parallel import give_way
from kdrl_pl.rewards.base import Completion, Reward, RewardOutput
from kdrl_pl.rewards.guard import GuardedReward
from kdrl_pl.rollout.engine import Completions, RolloutEngine, RolloutInterrupted
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.statistics import rollout_statistics
from kdrl_pl.rollout.streams import group_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrl_pl.models.language_model import LanguageModel

log = logging.getLogger(__name__)

EVALUATION = -1  # rollout number in the random streams of evaluation: every validation draws the same numbers


class RolloutCallback(Callback):
    """Fills `batch.experience` with responses and rewards before each training, validation, test or predict step.

    Args:
        reward: the rule that judges responses, by class_path; see kdrl_pl.rewards. It is guarded: its failures cost
            rows, not the run, until there are too many; name kdrl_pl.rewards.GuardedReward to choose the limits.
        group_size: responses per prompt in training; at least 2, or 1 in pure distillation.
        sampling: how they are drawn; temperature 1 without filters is the policy that is trained.
        validation_samples: responses per prompt in validation, test and predict.
        validation_sampling: how those are drawn; null draws them as in training.
        engine: what samples; the in-process engine works everywhere.
        seed: of the random streams of the rows.
        policy: who answers in validation, test and predict: "student" or "teacher".
    """

    def __init__(
        self,
        reward: Reward,
        group_size: int = 8,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        validation_samples: int = 4,
        validation_sampling: Sampling | None = None,
        engine: RolloutEngine | None = None,
        seed: int = 0,
        policy: str = "student",
    ) -> None:
        if group_size < 1:
            raise ValueError(f"rollout.group_size is {group_size}; expected at least 1 (2 with a policy gradient)")
        if validation_samples < 1:
            raise ValueError(f"rollout.validation_samples is {validation_samples}; expected at least 1")
        if sampling.is_greedy:
            raise ValueError("rollout.sampling.temperature is 0: all responses of a group would be the same; use 1")
        if policy not in ("student", "teacher"):
            raise ValueError(f"rollout.policy is {policy!r}; expected student or teacher")
        self.reward = reward if isinstance(reward, GuardedReward) else GuardedReward(reward)
        self.group_size, self.sampling = group_size, sampling
        self.validation_samples = validation_samples
        self.validation_sampling = sampling if validation_sampling is None else validation_sampling
        self.engine = InProcessEngine() if engine is None else engine
        self.seed, self.policy = seed, policy

    def rollout(
        self,
        trainer: Any,
        pl_module: Any,
        batch: PromptBatch,
        samples: int,
        sampling: Sampling,
        number: int,
        meanwhile: Callable[[Experience], None] | None = None,
    ) -> Experience:
        """The experience of a batch: completions of every prompt, judged; whole groups in the order of the prompts.

        While worker processes judge, `meanwhile` is called with the experience, whose rewards are still missing.

        Raises:
            Preempted: a signal reached a rank; every rank raises it.
            RunError: the student's logits are no numbers.
        """
        model = self._model(trainer, pl_module)
        keys = group_keys(self.seed, number, [p.uid for p in batch.prompts], batch.occurrences, samples)
        phases.begin("rollout")
        started = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            self.engine.sync(model, stop_ids(trainer.datamodule.tokenizer, model.model.generation_config))
            sampled = self._generate(batch, samples, sampling, keys)
        give_way(pl_module.device)
        generated = time.perf_counter()
        phases.begin("reward")
        completions = _completions(trainer.datamodule.tokenizer, batch.prompts, sampled, samples, sampling)
        experience = _experience(trainer.datamodule.tokenizer, completions, sampled, samples, sampling)
        on_device = experience.to(pl_module.device)
        judged = self._judge(completions, on_device, meanwhile)
        give_way(pl_module.device)  # before ranks wait for each other in `score`
        for rows in (experience, on_device):
            _fill_in(rows, judged)
        batch.completions = [completion.text for completion in completions]
        batch.by_student = model is pl_module.student
        batch.answers, batch.reward_parts = judged.answers or [], judged.parts
        batch.sampler_is_exact = not sampling.is_filtered and not sampling.is_greedy
        batch.sampler_dtype = getattr(self.engine, "dtype", None)
        batch.metrics |= {
            **rollout_statistics(experience, judged),
            "time/rollout": (generated - started, 1),
            "time/reward": (time.perf_counter() - generated, 1),
            "perf/rollout_tokens_per_s": (sum(map(len, sampled.token_ids)), generated - started),
        }
        return on_device

    def _judge(
        self, completions: Sequence[Completion], experience: Experience, meanwhile: Callable[[Experience], None] | None
    ) -> RewardOutput:
        if meanwhile is None or not self.reward.runs_in_workers:
            return self.reward(completions)
        with ThreadPoolExecutor(1, "reward") as waiting:  # the thread only waits for the workers
            judged = waiting.submit(self.reward, completions)
            meanwhile(experience)
            return judged.result()

    def _generate(self, batch: PromptBatch, samples: int, sampling: Sampling, keys: Sequence[int]) -> Completions:
        """What the engine sampled; nothing when a signal made it give up."""
        try:
            prompts = [prompt.input_ids for prompt in batch.prompts]
            return self.engine.generate(prompts, samples, sampling, keys, phases.counted(signals.should_stop))
        except RolloutInterrupted:
            if not signals.received():
                raise
            return Completions()
        except FloatingPointError as error:
            raise RunError(
                f"rollout {batch.rollout}: {error}. Resume from an earlier checkpoint with a lower learning rate"
            ) from error

    def _train(self, trainer: Any, pl_module: Any, batch: PromptBatch) -> None:
        ahead: dict[str, tuple[float, float]] = {}

        def meanwhile(experience: Experience) -> None:
            with trainer.precision_plugin.forward_context():
                pl_module.ask_ahead(experience, batch.rollout, ahead)

        batch.experience = self.rollout(
            trainer, pl_module, batch, self.group_size, self.sampling, batch.rollout, meanwhile
        )
        waited = batch.metrics["time/reward"][0] - ahead.get("time/teacher", (0.0, 1))[0]
        batch.metrics |= {**ahead, "time/reward": (waited, 1)}
        with trainer.precision_plugin.forward_context():
            pl_module.score(batch.experience, batch.rollout, batch.metrics, teacher_is_asked=bool(ahead))

    def _evaluate(self, trainer: Any, pl_module: Any, batch: PromptBatch) -> None:
        batch.experience = self.rollout(
            trainer, pl_module, batch, self.validation_samples, self.validation_sampling, EVALUATION
        )

    def _model(self, trainer: Any, pl_module: Any) -> LanguageModel:
        if trainer.training or self.policy == "student":
            return pl_module.student
        if pl_module.teacher is None:
            raise ValueError("rollout.policy is teacher, but there is none; set model.teacher.path")
        pl_module.teacher.load(pl_module.device, trainer.datamodule.tokenizer)
        return pl_module.teacher.model

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.reward.setup()
        if stage == "fit" and self.sampling.is_filtered:
            log.warning(
                "rollout.sampling filters the vocabulary (top_p, top_k or min_p): the sampler is then another policy "
                "than the one that is trained, and the distillation gradient is biased"
            )
        dtype = getattr(self.engine, "dtype", None)
        if stage == "fit" and dtype is not None and pl_module.objective.importance_cap is None:
            raise ValueError(
                f"rollout.engine samples in {dtype}, from a policy slightly other than the one that is trained; set "
                "model.importance_cap: 2.0, or rollout.engine.init_args.dtype: null"
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.reward.close()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: PromptBatch, batch_idx: int) -> None:
        self._train(trainer, pl_module, batch)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(trainer, pl_module, batch)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start


def _completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampled: Completions,
    samples: int,
    sampling: Sampling,
) -> list[Completion]:
    texts = tokenizer.batch_decode(sampled.token_ids, skip_special_tokens=True)
    return [
        Completion(prompts[row // samples], text, tuple(ids), not finished, sampling.max_tokens)
        for row, (text, ids, finished) in enumerate(zip(texts, sampled.token_ids, sampled.finished, strict=True))
    ]


def _experience(
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    sampled: Completions,
    samples: int,
    sampling: Sampling,
) -> Experience:
    """The rows before they are judged: rewards of 0."""
    return Experience.from_rows(
        [completion.prompt.input_ids for completion in completions],
        sampled.token_ids,
        [0.0] * len(completions),
        [row // samples for row in range(len(completions))],
        pad_token_id=tokenizer.pad_token_id,
        behavior_logprobs=sampled.logprobs,
        truncated=[completion.truncated for completion in completions],
        temperature=sampling.temperature or 1.0,
        max_response_tokens=sampling.max_tokens,
        uids=[completion.prompt.uid for completion in completions],
        teachers=[completion.prompt.teacher for completion in completions],
    )


def _fill_in(experience: Experience, judged: RewardOutput) -> None:
    values = [0.0 if value is None else value for value in judged.values]
    experience.rewards = torch.tensor(values, dtype=torch.float32, device=experience.device)
    verdicts = judged.correct or [False] * len(values)
    experience.correct = torch.tensor([bool(verdict) for verdict in verdicts], device=experience.device)
