"""What the data modules share: named sets, loaded when a stage needs them, and the student's tokenizer."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only

from kdrl_pl.data.loading import SetCounts
from kdrl_pl.data.sources import SourceConfig, kind_of, load_hub
from kdrl_pl.models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Trainer stage -> sections it reads; only the first must have a set.
_SECTIONS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
# The split that a procedural task takes in a section when its config names none: validation never sees training
# problems, while `predict` makes text to train on.
_DEFAULT_SPLIT = {"train": "train", "val": "val", "test": "test", "predict": "train"}


log = logging.getLogger(__name__)
_say = rank_zero_only(log.info)


class NamedSets(LightningDataModule):
    """Sections ("train", "val", ...) of named sets.

    Args:
        configs: section -> set name -> config; a config of None (an overlay's null) removes the set.
        tokenizer: folder or hub name; None takes the student's.
        limits: name -> value of the arguments that must be at least 1.

    Raises:
        ValueError: a limit is below 1, or a set name cannot be part of a uid and a metric name.
    """

    def __init__(
        self,
        configs: Mapping[str, Mapping[str, SourceConfig | None] | None],
        tokenizer: str | None,
        limits: Mapping[str, int],
    ) -> None:
        super().__init__()
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"data.{name} is {value}; expected at least 1")
        self.configs: dict[str, dict[str, Any]] = {}
        for section, sets in configs.items():
            self.configs[section] = {name: config for name, config in (sets or {}).items() if config is not None}
            for name in self.configs[section]:
                if not name or "/" in name:
                    raise ValueError(f"data.{section} has a set named {name!r}; expected a name without '/'")
        self.tokenizer_path = tokenizer
        self.rows: dict[str, dict[str, list[Any]]] = {}  # section -> set -> what it holds; filled by `setup`
        self.counts: dict[str, dict[str, SetCounts]] = {}  # section -> set -> what became of the source's rows
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @abstractmethod
    def load_set(self, name: str, config: Any, default_split: str) -> tuple[list[Any], SetCounts]:
        """What one set holds; `default_split` is for a procedural task whose config names none."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded at first use.

        Raises:
            ValueError: no `tokenizer` was given and no module with a `student_path` is attached; or its ids are not the
                student's.
        """
        if self._tokenizer is None:
            path = self.tokenizer_path
            if path is None and self.trainer is not None:
                path = getattr(self.trainer.lightning_module, "student_path", None)
            if path is None:
                raise ValueError(
                    "no tokenizer: set data.tokenizer to a folder or hub name (there is no student's to take)"
                )
            self._tokenizer = load_tokenizer(path)
            self._check_tokenizer(path)
        return self._tokenizer

    def _check_tokenizer(self, path: str) -> None:
        """Refuse one whose ids mean something else than the student's."""
        student = getattr(self.trainer.lightning_module, "student_path", None) if self.trainer is not None else None
        if student is None or student == path:
            return
        if self._tokenizer.get_vocab() != load_tokenizer(student).get_vocab():
            raise ValueError(
                f"data.tokenizer {path} has other token ids than the student {student}; expected its own, perhaps "
                "with another chat template; or set data.tokenizer: null"
            )

    @property
    def rank(self) -> int:
        """Number of this process; 0 without a Trainer."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Number of processes; 1 without a Trainer."""
        return self.trainer.world_size if self.trainer is not None else 1

    def prepare_data(self) -> None:
        """Downloads hub data sets on one process per machine, so that the others find them in the cache."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        for section in self._needed(stage) if stage else ():
            for config in self.configs[section].values():
                if kind_of(config.source) == "hub":
                    load_hub(config)

    def setup(self, stage: str) -> None:
        """Loads the sets that the stage needs, each once, and says what was left out of them.

        Raises:
            ValueError: the stage has no set, or a source, setting or row is bad.
        """
        for section in self._needed(stage):
            if section in self.rows:
                continue
            rows, counts = {}, {}
            for name, config in self.configs[section].items():
                rows[name], counts[name] = self.load_set(name, config, _DEFAULT_SPLIT[section])
                if left_out := counts[name].left_out():
                    _say(f"data.{section}.{name}: {len(rows[name])} rows kept; {left_out}")
            self.rows[section], self.counts[section] = rows, counts

    def _needed(self, stage: str) -> list[str]:
        sections = _SECTIONS[stage]
        if not self.configs.get(sections[0]):
            raise ValueError(
                f"data.{sections[0]} has no set, and this command needs one; for example "
                f"data.{sections[0]}: {{name: {{source: rows.jsonl}}}}"
            )
        return [section for section in sections if self.configs.get(section)]
