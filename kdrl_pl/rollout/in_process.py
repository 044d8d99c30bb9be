"""Rollouts by the training model itself, in the training process: no second copy of the weights, nothing to transfer.

Notation: P prompts, G group size, B rows in the batch, L longest prompt of the batch, V* vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from kdrl_pl.parallel import gathered_weights
from kdrl_pl.rollout.decoder import Decoder, forward_arguments
from kdrl_pl.rollout.engine import Completions
from kdrl_pl.rollout.requests import check_request
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.weights import cached_autocast, weights_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdrl_pl.models.language_model import LanguageModel


class InProcessEngine:
    """Decodes with the student's own modules; works for every transformers model with a key/value cache.

    A prompt is prefilled once and its cache handed to all rows of its group; rows that are done leave the batch, and
    rows that wait take their place. Runs under `no_grad` (not `inference_mode`, whose tensors cannot enter a backward)
    and under whatever autocast the caller has set; logits are sampled from in fp32.

    Args:
        max_rows: rows decoded at a time, to bound memory; longest prompts first. null = all at once.
        refill: let waiting rows start in the place of finished ones as soon as there are some; false decodes batch
            after batch, as layers that are neither full nor sliding attention always do. Samples do not depend on it.
        compact_at: share of finished rows at which they are taken out of the batch or replaced. Lower saves arithmetic,
            higher saves copying the cache. Samples do not depend on it.
        dtype: "bfloat16" decodes with a copy of the weights in that dtype, made anew for every rollout: faster where
            the processor multiplies in it, at half the memory of the cache. Samples and their log-probs are then those
            of a slightly different policy, which model.importance_cap must make good. null = the student's weights.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self, max_rows: int | None = None, refill: bool = True, compact_at: float = 0.125, dtype: str | None = None
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; expected at least 1 row, or null for all at once")
        if not 0 < compact_at <= 1:
            raise ValueError(f"compact_at is {compact_at}; expected a share in (0, 1]")
        if dtype not in (None, "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}; expected bfloat16, or null for the student's weights")
        self.max_rows, self.refill, self.compact_at, self.dtype = max_rows, refill, compact_at, dtype
        self._student: LanguageModel | None = None
        self._stop_token_ids: list[int] = []

    def sync(self, student: LanguageModel, stop_token_ids: Iterable[int]) -> None:
        """Remember the model to decode with; its weights are read when `generate` runs.

        Raises:
            ValueError: the model keeps no key/value cache.
        """
        if "past_key_values" not in forward_arguments(student.model):
            raise ValueError(
                f"{type(student.model).__name__}.forward takes no past_key_values; the in-process engine needs a "
                "decoder with a key/value cache, use another rollout engine"
            )
        self._student = student
        # Ids beyond V* cannot be sampled; a config's default may well name one (GPT-2's 50256 in a small model).
        self._stop_token_ids = [token for token in stop_token_ids if token < student.vocab_size]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        keys: Sequence[int],
        should_stop: Callable[[], bool] | None = None,
    ) -> Completions:
        """See `RolloutEngine.generate`; under FSDP2 every rank calls it, with as many prompts as it likes.

        Raises:
            RolloutInterrupted: `should_stop` returned True.
            ValueError: a prompt is empty, too long for the model or has an id outside the vocabulary; the number of
                keys is not P·G; no `sync` came before.
            FloatingPointError: the model's logits were NaN.
        """
        if self._student is None:
            raise ValueError("the engine has no model; call sync(student, stop_token_ids) before generate")
        student = self._student
        stops = [*self._stop_token_ids, *(sampling.stop_token_ids or ())]
        _check_request(student, prompts, group_size, sampling, keys)
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        with (
            gathered_weights(student),
            evaluating(student),
            weights_in(student.model, dtype),
            cached_autocast(student.device.type),  # of the gathered weights: offloaded ones lie elsewhere
        ):
            return Decoder(
                student.model,
                student.vocab_size,
                stops,
                sampling,
                max_rows=self.max_rows or max(len(keys), 1),
                refill=self.refill,
                compact_at=self.compact_at,
                should_stop=should_stop,
            ).run(prompts, group_size, keys)


def _check_request(
    student: LanguageModel,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    sampling: Sampling,
    keys: Sequence[int],
) -> None:
    known = int(student.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    check_request(prompts, group_size, sampling, keys, known_ids=known, vocab_size=student.vocab_size)
    limit = _learned_positions(student.model)
    needed = max(map(len, prompts), default=0) + sampling.max_tokens - 1  # the last token is never read
    if limit is not None and needed > limit:
        raise ValueError(
            f"the longest prompt and sampling.max_tokens {sampling.max_tokens} need {needed} positions, "
            f"but {type(student.model).__name__} has {limit}; lower sampling.max_tokens"
        )


def _learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model without rotary embedding has a vector for; None where nothing but quality ends."""
    config = model.config.get_text_config()
    is_rotary = getattr(config, "rope_parameters", None) is not None
    return None if is_rotary else getattr(config, "max_position_embeddings", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and the like off inside; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
