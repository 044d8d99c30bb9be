"""A teacher's log-probs on disk: what was scored once is looked up."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.teacher.store import Store


class TeacherCache:
    """Keeps the log-probs of rows, so that resumed runs, rows that come again and other runs never score them twice.

    A row is found by the teacher (its files, precision and attention), temperature, stop cell, prompt and response. One
    folder serves any number of teachers, runs and processes at a time. Which rows share a pass moves a log-prob by its
    rounding (1e-6 nats in float32, 1e-2 in bfloat16), so a run with a cache equals one without it up to that. Within a
    run what is used is always what is stored, and the rows of a rollout are stored all or none: a run that is resumed
    beside its cache is bit for bit the run that was not interrupted, as long as those rows have not had to make room.

    Args:
        folder: where the file lies, on a local disk. It takes 4 bytes per response token.
        max_gb: largest size of the file in GB (1e9 bytes); the oldest rows make room.

    Raises:
        ValueError: `max_gb` is not positive, or the folder cannot be written (when the teacher is loaded).
    """

    def __init__(self, folder: str, max_gb: float = 20.0) -> None:
        if not max_gb > 0:
            raise ValueError(f"teacher.cache.max_gb is {max_gb}; expected a size above 0 (cache: null for none)")
        self.folder = folder
        self._store = Store(folder, int(max_gb * 1e9))

    def open(self) -> None:
        """Make sure that the folder can be used."""
        try:
            self._store.open()
        except OSError as error:
            raise ValueError(
                f"teacher.cache.folder {self.folder!r} cannot be used ({error}); name a folder on a local disk that "
                "can be written, or set teacher.cache: null"
            ) from None

    def get(self, keys: set[bytes]) -> dict[bytes, Tensor]:
        """Log-probs, (response tokens,) float32 on the CPU, of the rows among `keys` that are stored."""
        return {key: _tensor(value) for key, value in self._store.get(keys).items()}

    def put(self, logprobs: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        """Store those of new rows, all or none; returns what stands under their keys from now on."""
        values = {key: value.numpy().tobytes() for key, value in logprobs.items()}
        return {key: _tensor(value) for key, value in self._store.put(values).items()}


def score_through(
    cache: TeacherCache,
    teacher: str,
    experience: Experience,
    asked: Tensor,
    score: Callable[[Experience, Tensor], None],
) -> tuple[float, float]:
    """Fill in `teacher_logprobs` where `asked`, by the cache where it knows the row and by `score` where it does not.

    Args:
        cache: what is looked up and added to.
        teacher: all that decides about a log-prob beside the row.
        experience: rows.
        asked: (B, T) bool, response tokens.
        score: fills in `teacher_logprobs` of some rows where its second argument, (B', T') bool, says so; called once,
            with no rows where none is missing.

    Returns:
        rows found in the cache, and rows with a token asked for.
    """
    keys = row_keys(teacher, experience, asked.any(1).nonzero().flatten().tolist())
    known = cache.get(set(keys.values()))
    missing = {key: row for row, key in keys.items() if key not in known}  # of equal rows one is scored
    part = experience[list(missing.values())]
    score(part, part.response_mask)
    fresh = [part.teacher_logprobs[i][part.response_mask[i]].cpu() for i in range(len(part))]
    hits = sum(key in known for key in keys.values())
    known |= cache.put(dict(zip(missing, fresh, strict=True)))
    logprobs = torch.zeros(asked.shape, dtype=torch.float32, device=asked.device)
    if keys:
        responses = torch.zeros_like(asked)
        responses[list(keys)] = experience.response_mask[list(keys)]
        logprobs[responses] = torch.cat([known[key] for key in keys.values()]).to(asked.device)
    experience.teacher_logprobs = torch.where(asked, logprobs, 0.0)
    return float(hits), float(len(keys))


def row_keys(teacher: str, experience: Experience, rows: list[int]) -> dict[int, bytes]:
    """row -> 16 bytes that name it, its teacher and how it is asked; `rows` rise."""
    ids = experience.input_ids.cpu()
    lengths = experience.attention_mask.sum(1).tolist()
    prompts = experience.prompt_lengths.tolist()
    common = blake2b(repr((teacher, experience.temperature, experience.stop_cell)).encode(), digest_size=16)
    keys = {}
    for row in rows:
        digest = common.copy()
        digest.update(prompts[row].to_bytes(8, "little") + ids[row, : lengths[row]].numpy().tobytes())
        keys[row] = digest.digest()
    return keys


def _tensor(value: bytes) -> Tensor:
    return torch.frombuffer(bytearray(value), dtype=torch.float32)
