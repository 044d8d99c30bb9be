"""RolloutCallback: samples a group of responses to every prompt of a batch and judges them.

Every hook is one line; where a rollout happens is kdrl_pl/rollout/sample.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from kdrl_pl.data.prompts import PromptBatch
from kdrl_pl.experience import Experience
from kdrl_pl.rewards.base import Reward
from kdrl_pl.rewards.guard import GuardedReward
from kdrl_pl.rollout.engine import RolloutEngine
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sample import sample_experience
from kdrl_pl.rollout.sampling import Sampling

if TYPE_CHECKING:
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
        """The judged rows of a batch, see `sample_experience`.

        Raises:
            Preempted: a signal reached a rank; every rank raises it.
            RunError: the student's logits are no numbers.
        """
        model = self._model(trainer, pl_module)
        batch.by_student = model is pl_module.student
        return sample_experience(
            batch,
            model,
            trainer.datamodule.tokenizer,
            self.engine,
            self.reward,
            samples=samples,
            sampling=sampling,
            seed=self.seed,
            number=number,
            device=pl_module.device,
            precision=trainer.precision_plugin.forward_context,
            meanwhile=meanwhile,
        )

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
        return pl_module.teacher.sampler()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.reward.setup()
        if pl_module.teacher is not None and stage != "predict":
            sets = (prompts for section in trainer.datamodule.rows.values() for prompts in section.values())
            pl_module.teacher.check_names((prompt.uid, prompt.teacher) for prompts in sets for prompt in prompts)
        if stage == "fit" and self.sampling.is_filtered:
            log.warning(
                "rollout.sampling filters the vocabulary (top_p, top_k or min_p): the sampler is then another policy "
                "than the one that is trained, and the distillation gradient is biased"
            )
        dtype = getattr(self.engine, "dtype", None)
        if stage == "fit" and dtype is not None and pl_module.objective.importance_cap is None:
            raise ValueError(
                f"rollout.engine samples in {dtype}, from a policy slightly other than the one that is trained; set "
                "model.importance_cap: 2.0, or rollout.engine.init_args.dtype: null with the in-process engine"
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
