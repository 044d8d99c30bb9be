"""The data side of a run: named sets of prompts in, one `PromptBatch` per rollout out."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from kdrl_pl.data.base import NamedSets
from kdrl_pl.data.curriculum import Curriculum, CurriculumSampler
from kdrl_pl.data.loaders import EvaluationLoader, RolloutLoader
from kdrl_pl.data.loading import OnBadRow, SetConfig, SetCounts, load_prompts
from kdrl_pl.data.prompts import Prompt
from kdrl_pl.data.sampler import PromptSampler
from kdrl_pl.data.template import Template
from kdrl_pl.identity import check_same


class PromptDataModule(NamedSets):
    """Prompts from files, Hugging Face data sets and procedural tasks, by named sets.

    After `setup`, `rows[section][set]` holds the prompts and `counts[section][set]` what became of the source's rows.

    Args:
        train: sets to train on, mixed by weight.
        val: sets to validate on, one after the other.
        test: sets of `kdrl test`.
        predict: sets of `kdrl predict`.
        tokenizer: folder or hub name of the tokenizer; null takes the student's.
        prompts_per_rollout: training prompts per rollout over all ranks.
        val_batch_size: prompts per batch of validation, test and predict on each rank.
        max_prompt_tokens: longer prompts, the response prefix included, are dropped and counted.
        seed: of the order of the training prompts.
        curriculum: draw prompts the more often, the nearer their measured pass rate is to a target, by class_path; null
            walks through each set in random order.
        template: how a prompt becomes text; a set may have its own.
        on_bad_row: "error" stops at a row that cannot be used and names it, "skip" leaves it out and counts it.

    Raises:
        ValueError: a number is below 1, or a set's name holds a slash.
    """

    def __init__(
        self,
        train: dict[str, SetConfig | None] | None = None,
        val: dict[str, SetConfig | None] | None = None,
        test: dict[str, SetConfig | None] | None = None,
        predict: dict[str, SetConfig | None] | None = None,
        tokenizer: str | None = None,
        prompts_per_rollout: int = 128,
        val_batch_size: int = 64,
        max_prompt_tokens: int = 1024,
        seed: int = 0,
        curriculum: Curriculum | None = None,
        template: Template = Template(),  # noqa: B008 (frozen)
        on_bad_row: OnBadRow = "error",
    ) -> None:
        super().__init__(
            {"train": train, "val": val, "test": test, "predict": predict},
            tokenizer,
            {
                "prompts_per_rollout": prompts_per_rollout,
                "val_batch_size": val_batch_size,
                "max_prompt_tokens": max_prompt_tokens,
            },
        )
        self.prompts_per_rollout = prompts_per_rollout
        self.val_batch_size = val_batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self.curriculum = curriculum
        self.template = template
        self.on_bad_row = on_bad_row
        self.resume_anyway = False
        self._sampler: PromptSampler | None = None
        self._fingerprint: str | None = None

    def load_set(self, name: str, config: SetConfig, default_split: str) -> tuple[list[Prompt], SetCounts]:
        """The prompts of one set; see `load_prompts`."""
        return load_prompts(
            name,
            config,
            self.tokenizer,
            template=self.template,
            max_prompt_tokens=self.max_prompt_tokens,
            on_bad_row=self.on_bad_row,
            default_split=default_split,
        )

    def setup(self, stage: str) -> None:
        """Loads the sets that the stage needs, each once.

        Raises:
            ValueError: the stage has no set, a row or setting is bad, or the training prompts do not make a rollout.
        """
        super().setup(stage)
        if stage == "fit":
            weights = {name: config.weight for name, config in self.configs["train"].items()}
            rest = (weights, self.prompts_per_rollout, self.seed, self.world_size)
            if self.curriculum is None:
                sizes = {name: len(prompts) for name, prompts in self.rows["train"].items()}
                self._sampler = PromptSampler(sizes, *rest)
            else:
                uids = {name: [prompt.uid for prompt in prompts] for name, prompts in self.rows["train"].items()}
                self._sampler = CurriculumSampler(self.curriculum, uids, *rest)

    def train_dataloader(self) -> RolloutLoader:
        """One `PromptBatch` per rollout, from the module's `rollouts_done` on."""
        if self._sampler is None:
            raise RuntimeError("setup('fit') has not run")
        return RolloutLoader(self.rows["train"], self._sampler, self._position, self.rank, self.world_size)

    def _position(self) -> tuple[int, int | None]:
        """Rollouts done so far, and the rollouts Lightning takes for an epoch (fewer under `limit_train_batches`)."""
        if self.trainer is None:
            return 0, None
        done: Any = self.trainer.lightning_module.rollouts_done
        limit = self.trainer.num_training_batches
        return int(done), limit if isinstance(limit, int) and limit > 0 else None

    def val_dataloader(self) -> list[EvaluationLoader]:
        """One loader per validation set, in the order of the config."""
        return self._evaluation_loaders("val")

    def test_dataloader(self) -> list[EvaluationLoader]:
        """One loader per test set, in the order of the config."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> list[EvaluationLoader]:
        """One loader per predict set, in the order of the config."""
        return self._evaluation_loaders("predict")

    def _evaluation_loaders(self, section: str) -> list[EvaluationLoader]:
        sets = self.rows.get(section, {})
        return [
            EvaluationLoader(name, prompts, self.val_batch_size, self.rank, self.world_size)
            for name, prompts in sets.items()
        ]

    def fingerprint(self) -> str:
        """A digest of the training prompts (uids, token ids, answers), the same on every rank, for checks on resume."""
        if self._fingerprint is None:
            digest = blake2b(digest_size=16)
            for prompts in self.rows["train"].values():
                for prompt in prompts:
                    digest.update(repr((prompt.uid, prompt.input_ids, prompt.answer)).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must have too, and pass rates; the place in the data is the module's `rollouts_done`."""
        state: dict[str, Any] = {"train": self.fingerprint()}
        if isinstance(self._sampler, CurriculumSampler):
            state["pass_rates"] = self._sampler.state_dict(self._position()[0])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare, and take over pass rates; a run that gets its curriculum later begins without any.

        Raises:
            ValueError: a run is resumed with other training prompts, and `resume_anyway` is not set.
        """
        if self.trainer.state.fn != "fit":
            return
        cure = "use the same sets, template and limits in data, or start a new run from the exported student"
        check_same("on data set", state_dict["train"], self.fingerprint(), cure, self.resume_anyway)
        if isinstance(self._sampler, CurriculumSampler):
            self._sampler.load_state_dict(state_dict.get("pass_rates", {}))
