"""Prompts and the batch that travels through Lightning: one batch is one rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdrl_pl.experience import Experience


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the model.

    Args:
        uid: stable name of the row, `"<set>/<row>"`; part of the key of its random stream.
        text: what the model reads, after template, system prompt, few-shot and response prefix.
        input_ids: its token ids (at least one).
        answer: the reference answer the rule compares with; None when the reward needs none.
        dataset: name of the set it comes from.
        columns: the row's other columns, for rewards that want them.
        teacher: which of several teachers scores its responses (`RoutedTeacher`); None is their default.
    """

    uid: str
    text: str
    input_ids: tuple[int, ...]
    answer: str | None = None
    dataset: str = "train"
    columns: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None


class PromptBatch:
    """The prompts of rollout `k` on this rank; `RolloutCallback` fills in `experience`.

    Args:
        rollout: k, counted from 0 over the whole run; in evaluation the number of the batch.
        prompts: this rank's prompts, one per group: every `world_size`-th prompt of the global list.
        occurrences: per prompt, which occurrence of its uid in the *global* list of this rollout it is (0, 1, ...).
        dataset: in evaluation the name of the set; "train" otherwise.
        is_padding: per prompt, True for a copy that only keeps ranks in step (evaluation of a set that does not divide
            by the number of ranks); it is generated but never counted.
    """

    def __init__(
        self,
        rollout: int,
        prompts: Sequence[Prompt],
        occurrences: Sequence[int] | None = None,
        dataset: str = "train",
        is_padding: Sequence[bool] | None = None,
    ) -> None:
        self.rollout = rollout
        self.prompts = list(prompts)
        self.occurrences = list(occurrences) if occurrences is not None else [0] * len(self.prompts)
        self.dataset = dataset
        self.is_padding = list(is_padding) if is_padding is not None else [False] * len(self.prompts)
        self.experience: Experience | None = None
        self.completions: list[str] = []  # one text per row of `experience`
        self.answers: list[str | None] = []  # the answer the rule read in each completion, for maj@k
        self.reward_parts: dict[str, list[float | None]] = {}  # name of a reward -> one value per row, before weights
        self.sampler_is_exact = True  # False when filters make the sampler another policy than the one scored
        self.sampler_dtype: str | None = None  # what the sampler computed in, where that is not what the trainer does
        self.by_student = True  # False when the teacher answered, in evaluation
        self.metrics: dict[str, tuple[float, float]] = {}  # name -> (sum, count), summed over ranks before it is logged

    def __len__(self) -> int:
        return len(self.prompts)
