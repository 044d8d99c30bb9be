"""The token loop of the in-process engine: rows start, decode together, and leave as they finish.

Notation: P prompts read together, G group size, B lines of the batch (rows that decode now), W columns, V* vocabulary.

All lines of the batch end in the same column, W - 1; a line begins where its prompt does, and what lies left of it is
masked. So a row may start at any time in the line of a finished one: its prompt is laid against the right edge, where
the next token of every line goes, and distances between columns stay distances between tokens, which is what sliding
windows count. Rows start in the order of their prompts' lengths, longest first, so a newcomer's prompt is never wider
than the batch: every line in it began with a prompt at least as long.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kdrl_pl.rollout.engine import Completions, RolloutInterrupted
from kdrl_pl.rollout.sampling import Sampling, next_tokens
from kdrl_pl.rollout.streams import uniforms

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_STEPS = 64  # tokens per block of random numbers, and at most between two looks at what was sampled
_CHECK_EVERY = {"cpu": 1}  # steps between two counts of stopped rows, elsewhere 8: each count waits for the GPU


class Decoder:
    """Decodes the rows of one rollout.

    Args:
        model: in eval mode, with a key/value cache.
        vocab_size: V*.
        stops: ids that end a row, all below V*.
        sampling: how tokens are drawn.
        max_rows: lines decoded at a time.
        refill: let waiting rows take the lines of finished ones; else a batch ends before the next one starts.
        compact_at: share of finished lines at which they leave.
        should_stop: polled before every forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        stops: Iterable[int],
        sampling: Sampling,
        max_rows: int,
        refill: bool,
        compact_at: float,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self.model, self.vocab_size = model, vocab_size
        self.stops, self.sampling = set(stops), sampling
        self.max_rows, self.refill, self.compact_at = max_rows, refill, compact_at
        self.should_stop = should_stop
        self.device = next(model.parameters()).device
        self.arguments = forward_arguments(model)
        self.is_stop = torch.zeros(vocab_size, dtype=torch.bool, device=self.device)  # (V*,)
        self.is_stop[list(self.stops)] = True
        self.check_every = _CHECK_EVERY.get(self.device.type, 8)

    def run(self, prompts: Sequence[Sequence[int]], group_size: int, keys: Sequence[int]) -> Completions:
        """Token ids, log-probs and finished flags of all P·G rows, see `RolloutEngine.generate`."""
        count = len(prompts) * group_size
        self.prompts, self.group_size, self.keys = prompts, group_size, keys
        self.done = Completions([[] for _ in range(count)], [[] for _ in range(count)], [False] * count)
        self.waiting = deque(sorted(range(count), key=lambda row: -len(prompts[row // group_size])))
        while self.waiting:
            _Batch(self).decode()
        return self.done

    def prefill(self) -> Prefilled:
        """Read the prompts of the next `max_rows` waiting rows, each once."""
        numbers = list(dict.fromkeys(row // self.group_size for row in islice(self.waiting, self.max_rows)))
        return Prefilled(self, numbers)

    def forward(self, input_ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache) -> Tensor:
        """(B, V*) fp32 logits after the last column of `input_ids`, whose keys and values enter the cache."""
        if self.should_stop is not None and self.should_stop():
            raise RolloutInterrupted("the rollout was asked to stop")
        optional = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        inputs = {name: value for name, value in optional.items() if name in self.arguments}
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **inputs)
        return output.logits[:, -1, : self.vocab_size].float()


class Prefilled:
    """Prompts that were read and whose rows have not all started.

    Args:
        decoder: reads them.
        numbers: (P,) which prompts.
    """

    def __init__(self, decoder: Decoder, numbers: Sequence[int]) -> None:
        from kdrl_pl.rollout.kv_cache import growing_cache, is_growing

        self.line_of = {number: line for line, number in enumerate(numbers)}
        prompts = [decoder.prompts[number] for number in numbers]
        lengths = [len(prompt) for prompt in prompts]
        self.width = max(lengths)
        input_ids = torch.zeros(len(prompts), self.width, dtype=torch.int64)
        for line, prompt in enumerate(prompts):
            input_ids[line, self.width - len(prompt) :] = torch.as_tensor(prompt)
        begins = self.width - torch.tensor(lengths)  # (P,)
        columns = torch.arange(self.width) - begins[:, None]  # (P, L), 0 at the first token
        mask = None if min(lengths) == self.width else (columns >= 0).to(decoder.device)
        self.cache = growing_cache(decoder.model.config)
        self.is_growing = is_growing(self.cache)
        self.logits = decoder.forward(
            input_ids.to(decoder.device), mask, columns.clamp(min=0).to(decoder.device), self.cache
        )  # (P, V*)


class _Batch:
    """The lines that decode together, and what changes from step to step."""

    positions: Tensor  # (B, 1) of the next tokens

    def __init__(self, decoder: Decoder) -> None:
        from kdrl_pl.rollout.kv_cache import expanded

        self.decoder, self.device = decoder, decoder.device
        self.prefilled: Prefilled | None = decoder.prefill()
        self.is_growing = self.prefilled.is_growing
        self.refill = decoder.refill and self.is_growing
        self.step = self.drawn = 0  # tokens drawn since the batch began; the step at which `numbers` begin
        self.rows = self._take(decoder.max_rows)  # (B,) which row each line is
        self.born = np.zeros(len(self.rows), dtype=np.int64)  # (B,) step at which it started
        self.width = self.prefilled.width  # W
        self.first = self.width - self._prompt_lengths(self.rows)  # (B,) column where it begins
        self.tokens, self.stopped, self.ended = self._first_tokens(self.rows)  # (B,) each; `ended` is the host's view
        self.numbers = self._numbers(self.rows, self.born)  # (B, _STEPS) of the steps from `drawn` on
        self.sampled: list[Tensor] = []  # (B,) of each step since the host looked
        self.scored: list[Tensor] = []
        self.cache = expanded(self.prefilled.cache, self._prefilled_lines(self.rows))
        self._forget_prefilled()
        self._place()

    def decode(self) -> None:
        """Until every line has ended and, with refill, no row is waiting."""
        decoder = self.decoder
        while self._goes_on():
            logits = decoder.forward(self.tokens[:, None], self._mask(), self.positions, self.cache)  # (B, V*)
            self.positions = self.positions + 1
            self.width += 1
            self.step += 1
            if self.step == self.drawn + _STEPS:
                self.drawn = self.step
                self.numbers = self._numbers(self.rows, self.born)
            numbers = self.numbers[:, self.step - self.drawn]
            self.tokens, logprobs = next_tokens(logits, numbers, decoder.sampling)  # (B,)
            self.stopped |= decoder.is_stop[self.tokens]
            self.sampled.append(self.tokens)
            self.scored.append(logprobs)

    # ---- between two steps -------------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        """Whether a line is left to decode, after ended ones left or were taken over, if it is time for that."""
        decoder = self.decoder
        while len(self.rows):
            enough = max(1, decoder.compact_at * len(self.rows))  # ended lines that are worth the copying
            is_over = self.step == self.last_step
            is_time = self.step % decoder.check_every == 0 and int(self.stopped.sum()) >= enough
            if not is_over and not is_time and len(self.sampled) < _STEPS:
                return True
            self._look()
            if not is_over and self.ended.sum() < enough:
                return True
            self._replace()
        return False

    def _look(self) -> None:
        """Hand what was sampled since the last look to the rows, up to their stop tokens."""
        if not self.sampled:
            return
        decoder, done = self.decoder, self.decoder.done
        _require_numbers(torch.stack(self.scored, 1))
        sampled, scored = torch.stack(self.sampled, 1).tolist(), torch.stack(self.scored, 1).tolist()  # B of n tokens
        stopped = self.stopped.tolist()
        self.sampled, self.scored = [], []
        for line in np.flatnonzero(~self.ended).tolist():
            row, tokens, logprobs = self.rows[line], sampled[line], scored[line]
            if stopped[line]:  # on a GPU it may have gone on since
                length = 1 + next(i for i, token in enumerate(tokens) if token in decoder.stops)
                tokens, logprobs = tokens[:length], logprobs[:length]
            done.token_ids[row] += tokens
            done.logprobs[row] += logprobs
            done.finished[row] = stopped[line]
            self.ended[line] = stopped[line] or len(done.token_ids[row]) == decoder.sampling.max_tokens

    def _replace(self) -> None:
        """Waiting rows take over the lines that ended; those that nobody wants leave the batch."""
        free = np.flatnonzero(self.ended)
        while self.refill and self.decoder.waiting and len(free):
            rows = self._take(len(free))
            self._take_over(free[: len(rows)], rows)
            free = free[len(rows) :]
        self._forget_prefilled()
        if len(free):
            self._leave(free)
        if len(self.rows):
            self._drop_columns()
            self._place()

    def _take_over(self, lines: np.ndarray, rows: list[int]) -> None:
        """These rows start in these lines: their prompts lie against the right edge, like everything else."""
        for line, row in zip(lines, rows, strict=True):
            self.rows[line] = row
        self.born[lines] = self.step
        self.first[lines] = self.width - self._prompt_lengths(rows)
        index = torch.from_numpy(lines).to(self.device)
        self.tokens[index], self.stopped[index], self.ended[lines] = self._first_tokens(rows)
        self.numbers[index] = self._numbers(rows, self.born[lines])
        source = self._prefilled_lines(rows)
        for layer, other in zip(self.cache.layers, self.prefilled.cache.layers, strict=True):
            layer.take_over(index, other, source)

    def _leave(self, lines: np.ndarray) -> None:
        """These lines go; the last of the others fill the gaps, so that few are copied."""
        from kdrl_pl.rollout.kv_cache import move_lines

        count = len(self.rows) - len(lines)
        gaps = lines[lines < count]
        movers = np.setdiff1d(np.arange(count, len(self.rows)), lines)
        for gap, mover in zip(gaps, movers, strict=True):
            self.rows[gap] = self.rows[mover]
        del self.rows[count:]
        for host in (self.born, self.first, self.ended):
            host[gaps] = host[movers]
        self.born, self.first, self.ended = self.born[:count], self.first[:count], self.ended[:count]
        targets, sources = torch.from_numpy(gaps).to(self.device), torch.from_numpy(movers).to(self.device)
        for tensor in (self.tokens, self.stopped, self.numbers):
            tensor[targets] = tensor[sources]
        self.tokens, self.stopped, self.numbers = self.tokens[:count], self.stopped[:count], self.numbers[:count]
        move_lines(self.cache, targets, sources, count)

    def _drop_columns(self) -> None:
        """The columns left of every line's first one go."""
        unused = int(self.first.min())
        if unused and self.is_growing:
            for layer in self.cache.layers:
                layer.drop_columns(unused)
            self.first -= unused
            self.width -= unused

    def _place(self) -> None:
        """What follows from where and when the lines now begin: positions of the next tokens, mask, last step."""
        self.positions = torch.from_numpy(self.width - self.first)[:, None].to(self.device)  # (B, 1)
        self.seen: Tensor | None = None  # (B, W and more) mask
        self.is_padded = bool(self.first.any())
        self.last_step = int(self.born.min()) + self.decoder.sampling.max_tokens - 1  # of the oldest lines' budget

    def _mask(self) -> Tensor | None:
        """(B, W + 1) columns that each line may look at; None without padding, attention's fastest path."""
        if not self.is_padded:
            return None
        if self.seen is None or self.seen.shape[1] <= self.width:
            columns = torch.arange(self.width + _STEPS, device=self.device)
            self.seen = columns >= torch.from_numpy(self.first).to(self.device)[:, None]
        return self.seen[:, : self.width + 1]

    # ---- rows that start ---------------------------------------------------------------------------------------

    def _take(self, count: int) -> list[int]:
        """Up to `count` waiting rows, all of prompts that are read; reads more of them when none is left."""
        waiting, group_size = self.decoder.waiting, self.decoder.group_size
        if waiting[0] // group_size not in self.prefilled.line_of:
            self.prefilled = self.decoder.prefill()
        rows: list[int] = []
        while waiting and len(rows) < count and waiting[0] // group_size in self.prefilled.line_of:
            rows.append(waiting.popleft())
        return rows

    def _forget_prefilled(self) -> None:
        if not self.decoder.waiting:
            self.prefilled = None  # its memory is wanted

    def _prefilled_lines(self, rows: Sequence[int]) -> Tensor:
        """(n,) where the prompts of these rows were read."""
        lines = [self.prefilled.line_of[row // self.decoder.group_size] for row in rows]
        return torch.tensor(lines, device=self.device)

    def _prompt_lengths(self, rows: Sequence[int]) -> np.ndarray:
        return np.array([len(self.decoder.prompts[row // self.decoder.group_size]) for row in rows])

    def _first_tokens(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, np.ndarray]:
        """The first tokens of these rows (n,), which of them stop, and which of the rows have thereby ended."""
        decoder, done = self.decoder, self.decoder.done
        numbers = torch.from_numpy(uniforms([decoder.keys[row] for row in rows], 0, 1)).to(self.device)  # (n, 1)
        logits = self.prefilled.logits[self._prefilled_lines(rows)]  # (n, V*)
        tokens, logprobs = next_tokens(logits, numbers[:, 0], decoder.sampling)
        _require_numbers(logprobs)
        stopped = decoder.is_stop[tokens]
        for row, token, logprob, ends in zip(rows, tokens.tolist(), logprobs.tolist(), stopped.tolist(), strict=True):
            done.token_ids[row], done.logprobs[row], done.finished[row] = [token], [logprob], ends
        ended = np.array([done.finished[row] or decoder.sampling.max_tokens == 1 for row in rows])
        return tokens, stopped, ended

    def _numbers(self, rows: Sequence[int], born: np.ndarray) -> Tensor:
        """(n, _STEPS) random numbers of the steps from `drawn` on: number t of a row belongs to step `born + t`."""
        numbers = np.zeros((len(rows), _STEPS))
        late = max(0, int(born.max()) - self.drawn)  # rows that start within the block, all at once
        starts = np.maximum(self.drawn - born, 0).tolist()
        numbers[:, late:] = uniforms([self.decoder.keys[row] for row in rows], starts, _STEPS - late)
        return torch.from_numpy(numbers).to(self.device)


def forward_arguments(model: PreTrainedModel) -> set[str]:
    """Names of the arguments of the model's forward, looked up below a PEFT wrapper."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return set(inspect.signature(base.forward).parameters)


def _require_numbers(logprobs: Tensor) -> None:
    if bool(logprobs.isnan().any()):
        raise FloatingPointError("the student's logits are NaN or infinite; its weights have diverged or overflowed")
