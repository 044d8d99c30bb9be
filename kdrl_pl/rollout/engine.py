"""What a rollout engine is: token ids in, sampled token ids and their log-probs out. Text is never re-tokenised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kdrl_pl.rollout.sampling import Sampling

if TYPE_CHECKING:
    from kdrl_pl.models.language_model import LanguageModel


class RolloutInterrupted(Exception):
    """A rollout was given up because `should_stop` said so; nothing of it is kept."""


@dataclass
class Completions:
    """The sampled rows of a rollout in prompt-major order: row `p * group_size + g` is sample g of prompt p.

    Args:
        token_ids: per row the sampled ids, the stop token included.
        logprobs: per row one number per token, nats (fp32), of the distribution it was sampled from.
        finished: per row, True when it ended with a stop token; False when `max_tokens` cut it off.
    """

    token_ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from the student."""

    def sync(self, student: LanguageModel, stop_token_ids: Iterable[int]) -> None:
        """Take the student's current weights; called on every rank before each rollout.

        Args:
            student: the model to sample from; ids from `student.vocab_size` on are never sampled.
            stop_token_ids: ids that end a completion, see `models.loading.stop_ids`.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        keys: Sequence[int],
        should_stop: Callable[[], bool] | None = None,
    ) -> Completions:
        """Sample `group_size` completions of each prompt.

        Args:
            prompts: (P,) token ids of each prompt, at least one each.
            group_size: G.
            sampling: temperature, filters, budget, further stop ids.
            keys: (P·G,) one random stream per row, prompt-major, see `streams.group_keys`.
            should_stop: polled at least once per token step.

        Raises:
            RolloutInterrupted: `should_stop` returned True.
        """
        ...
