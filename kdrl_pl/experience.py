"""What one rollout leaves behind: token ids, masks, log-probs, rewards and weights, one row per completion.

Notation: B rows, T tokens, H hidden, G rows of a group. Every per-token tensor is (B, T) and position t speaks of
`input_ids[:, t]`. A row is [prompt, response, padding], padding only on the right. Masks are bool and True counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kdrl_pl.plain_tensors import load_plain

# name -> (dtype, number of dimensions); the first block is required, the second is filled in by `KDRLModule.score`.
_REQUIRED = {
    "input_ids": (torch.int64, 2),
    "attention_mask": (torch.bool, 2),
    "response_mask": (torch.bool, 2),
    "rewards": (torch.float32, 1),
    "group": (torch.int64, 1),
}
_OPTIONAL = {
    "correct": (torch.bool, 1),
    "truncated": (torch.bool, 1),
    "behavior_logprobs": (torch.float32, 2),
    "old_logprobs": (torch.float32, 2),
    "teacher_logprobs": (torch.float32, 2),
    "teacher_mask": (torch.bool, 2),
    "reference_logprobs": (torch.float32, 2),
    "advantages": (torch.float32, 1),
    "token_weights": (torch.float32, 1),
    "kd_weights": (torch.float32, 2),
    "slopes": (torch.float32, 2),
    "teacher_hidden": (None, 3),
}
_TENSORS = {**_REQUIRED, **_OPTIONAL}


class Experience:
    """The rows of one rollout on one rank; whole groups, in the order of the prompts.

    A plain class on purpose: Lightning casts the floats of dataclasses and dicts under `bf16-true`, which would
    ruin log-probabilities.

    Args:
        input_ids: (B, T) int64, [prompt, response, padding].
        attention_mask: (B, T) bool, True on prompt and response.
        response_mask: (B, T) bool, True on tokens the student sampled, the end token included.
        rewards: (B,) float32, the shaped reward that advantages are made of.
        group: (B,) int64, rows with the same number answer the same prompt and stand next to each other.
        correct: (B,) bool, the binary verdict of the rule; default all False.
        truncated: (B,) bool, no end token within the budget; default all False.
        behavior_logprobs: (B, T) float32 nats, what the sampler saw; None when rows come from elsewhere.
        old_logprobs: (B, T) float32 nats, the student before the first update; None when rows are used for one update.
        teacher_logprobs: (B, T) float32 nats, of the `stop_cell` at a stop token; zero where `teacher_mask` is False.
        teacher_mask: (B, T) bool, tokens the teacher was asked about: those some term of the objective reads.
        reference_logprobs: (B, T) float32 nats, of the reference; None where no term asks it.
        advantages: (B,) float32.
        token_weights: (B,) float32, weight of each response token of the row in the summed loss.
        kd_weights: (B, T) float32, the same for the distillation term: mask, gate and normaliser in one, zero = masked.
        slopes: (B, T) float32, derivative in each log-prob of the one term that looks at all rows of an update at once;
            filled in by `KDRLModule.prepare`.
        teacher_hidden: (B, T, H) the teacher's last hidden states, only for the full-vocabulary form.
        temperature: of the sampler; student, old, behaviour and teacher log-probs all use it.
        stop_cell: ids that are one word wherever student and teacher are compared, see kdrl_pl/stop_cell.py.
        max_response_tokens: the sampler's budget (L_max of the normaliser "constant"); None when unknown.
        share_prompts: forward passes of the student read the prompt of a group once; `KDRLModule.score` decides it.
        uids: one string per row naming its prompt.
        teachers: per row which of several teachers scores it (`RoutedTeacher`); None, also for all, is their default.

    Raises:
        ValueError: a tensor has another shape, or a mask another layout, than stated above.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        rewards: Tensor,
        group: Tensor,
        *,
        correct: Tensor | None = None,
        truncated: Tensor | None = None,
        behavior_logprobs: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        reference_logprobs: Tensor | None = None,
        advantages: Tensor | None = None,
        token_weights: Tensor | None = None,
        kd_weights: Tensor | None = None,
        slopes: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        temperature: float = 1.0,
        stop_cell: Sequence[int] = (),
        max_response_tokens: int | None = None,
        share_prompts: bool = False,
        uids: Sequence[str] | None = None,
        teachers: Sequence[str | None] | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.response_mask = response_mask
        self.rewards = rewards
        self.group = group
        self.correct = torch.zeros_like(group, dtype=torch.bool) if correct is None else correct
        self.truncated = torch.zeros_like(group, dtype=torch.bool) if truncated is None else truncated
        self.behavior_logprobs = behavior_logprobs
        self.old_logprobs = old_logprobs
        self.teacher_logprobs = teacher_logprobs
        self.teacher_mask = teacher_mask
        self.reference_logprobs = reference_logprobs
        self.advantages = advantages
        self.token_weights = token_weights
        self.kd_weights = kd_weights
        self.slopes = slopes
        self.teacher_hidden = teacher_hidden
        self.temperature = float(temperature)
        self.stop_cell = tuple(stop_cell)
        self.max_response_tokens = max_response_tokens
        self.share_prompts = share_prompts
        self.uids = list(uids) if uids is not None else [str(g) for g in group.tolist()]
        self.teachers = list(teachers) if teachers is not None else [None] * len(self.uids)
        self._check()

    def _check(self) -> None:
        if self.input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(self.input_ids.shape)}; expected (rows, tokens)")
        rows, tokens = self.input_ids.shape
        for name, (dtype, ndim) in _TENSORS.items():
            value = getattr(self, name)
            if value is None:
                continue
            expected = (rows, tokens)[: min(ndim, 2)]
            if value.ndim != ndim or tuple(value.shape[: min(ndim, 2)]) != expected:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; expected {expected}{' + (H,)' if ndim == 3 else ''}"
                )
            both_float = dtype is not None and dtype.is_floating_point and value.is_floating_point()
            if dtype not in (None, value.dtype) and not both_float:
                raise ValueError(f"{name} has dtype {value.dtype}; expected {dtype}")
        for name in ("uids", "teachers"):
            if len(getattr(self, name)) != rows:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; expected one per row ({rows})")
        if rows == 0:
            return
        if bool((self.response_mask & ~self.attention_mask).any()):
            raise ValueError("response_mask is True on a padding position; it must lie inside attention_mask")
        if tokens and bool((~self.attention_mask[:, :-1] & self.attention_mask[:, 1:]).any()):
            raise ValueError("attention_mask has padding before a token; rows are [prompt, response, padding]")
        if tokens and bool(
            (self.response_mask[:, :-1] & self.attention_mask[:, 1:] & ~self.response_mask[:, 1:]).any()
        ):
            raise ValueError("response_mask ends before the row does; rows are [prompt, response, padding]")
        if bool(self.response_mask[:, :1].any()):
            raise ValueError("response_mask is True at position 0; a response needs at least one token before it")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Experience:
        """The named rows, right-padding common to all of them cut off. Weights travel with their rows."""
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows)
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        index = index.long()
        index = index.cpu()
        on_device = index.to(self.input_ids.device)
        width = int(self.attention_mask[on_device].sum(1).max()) if len(index) else self.input_ids.shape[1]
        picked = {}
        for name, (_, ndim) in _TENSORS.items():
            value = getattr(self, name)
            if value is not None:
                value = value[on_device]
                picked[name] = value if ndim == 1 else value[:, :width]
        uids, teachers = ([names[i] for i in index.tolist()] for names in (self.uids, self.teachers))
        return Experience(**picked, **self._common(), uids=uids, teachers=teachers)

    def to(self, device: torch.device | str) -> Experience:
        """The same rows on `device`; dtypes are never changed."""
        moved = {n: v.to(device) for n in _TENSORS if (v := getattr(self, n)) is not None}
        return Experience(**moved, **self._common(), uids=self.uids, teachers=self.teachers)

    def _common(self) -> dict:
        """What all rows have in common."""
        names = ("temperature", "stop_cell", "max_response_tokens", "share_prompts")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def response_lengths(self) -> Tensor:
        """(B,) int64, response tokens of each row, end token included."""
        return self.response_mask.sum(1)

    @property
    def prompt_lengths(self) -> Tensor:
        """(B,) int64, tokens of each row that are not response."""
        return self.attention_mask.sum(1) - self.response_mask.sum(1)

    def save(self, path: str | Path | BinaryIO) -> None:
        """Write the rows as plain tensors (loads with `weights_only=True`)."""
        tensors = {n: v.cpu() for n in _TENSORS if (v := getattr(self, n)) is not None}
        torch.save({**tensors, **self._common(), "uids": self.uids, "teachers": self.teachers}, path)

    @classmethod
    def load(cls, path: str | Path) -> Experience:
        """Read what `save` wrote, on the CPU.

        Raises:
            ValueError: it is another file, or one that could run code.
        """
        fields = load_plain(path)
        if not isinstance(fields, dict) or not fields.keys() >= _REQUIRED.keys():
            raise ValueError(f"{path} is no stored rollout; expected {', '.join(_REQUIRED)} and more")
        return cls(**fields)

    @classmethod
    def from_rows(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        rewards: Sequence[float] | Tensor,
        group: Sequence[int],
        *,
        pad_token_id: int = 0,
        behavior_logprobs: Sequence[Sequence[float]] | None = None,
        **fields,
    ) -> Experience:
        """Rows from ragged lists of token ids: the one place where padding is made.

        Args:
            prompts, responses: token ids per row; a prompt has at least one token.
            rewards, group: one number per row.
            behavior_logprobs: per row one number per response token.
            fields: further arguments of `Experience`; per-row ones may be lists.
        """
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        rows, width = len(lengths), max(lengths, default=0)
        ids = torch.full((rows, width), pad_token_id, dtype=torch.int64)
        attention, response = torch.zeros(rows, width, dtype=torch.bool), torch.zeros(rows, width, dtype=torch.bool)
        behavior = torch.zeros(rows, width) if behavior_logprobs is not None else None
        for i, (prompt, answer) in enumerate(zip(prompts, responses, strict=True)):
            start, end = len(prompt), lengths[i]
            ids[i, :end] = torch.as_tensor([*prompt, *answer], dtype=torch.int64)
            attention[i, :end] = True
            response[i, start:end] = True
            if behavior is not None:
                behavior[i, start:end] = torch.as_tensor(behavior_logprobs[i], dtype=torch.float32)
        for name in fields.keys() & _TENSORS.keys():
            if not (fields[name] is None or isinstance(fields[name], Tensor)):
                fields[name] = torch.as_tensor(fields[name], dtype=_TENSORS[name][0])
        return cls(
            ids,
            attention,
            response,
            torch.as_tensor(rewards, dtype=torch.float32),
            torch.as_tensor(group, dtype=torch.int64),
            behavior_logprobs=behavior,
            **fields,
        )
