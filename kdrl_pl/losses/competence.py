"""Weak teachers teach only what they can do: a gate by the teacher's own pass rate on each prompt (METHOD §7)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kdrl_pl.data.prompts import Prompt


@dataclass
class Competence:
    """Distils only prompts that the teacher itself solves, by responses of its own that were judged beforehand:

        kdrl predict --config FILE --rollout.policy teacher --output teacher.jsonl

    with the training sets under `data.predict`; on several ranks each writes a file, to be put together. Any JSON Lines
    do that have `uid` and `correct` (true, false or a share of correct responses); a row's `prompt`, where it has one,
    must be the text of the training prompt.

    Args:
        path: JSON Lines with one row per response of the teacher.
        at_least: share of the teacher's responses to a prompt that must be correct for the prompt to be distilled.

    Raises:
        ValueError: `at_least` is no share above 0.
    """

    path: str
    at_least: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.at_least <= 1:
            raise ValueError(
                f"distillation.competence.at_least is {self.at_least}; expected a share above 0 and at most 1 (null in "
                "place of competence distils every prompt)"
            )

    @cached_property
    def rates(self) -> dict[str, float]:
        """uid -> share of the teacher's responses that are correct; read at first use.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line is no row with `uid` and `correct`.
        """
        return {uid: right / rows for uid, (right, rows, _) in self._read.items()}

    @cached_property
    def _read(self) -> dict[str, tuple[float, int, bytes | None]]:
        """uid -> (sum of `correct`, rows, digest of the prompt's text)."""
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"no file {self.path!r} with the teacher's responses; {_cure(self.path)}")
        found: dict[str, tuple[float, int, bytes | None]] = {}
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    uid, correct, text = row["uid"], float(row["correct"]), row.get("prompt")
                except (ValueError, TypeError, KeyError):
                    uid, correct = None, -1.0
                if not isinstance(uid, str) or not 0 <= correct <= 1:
                    shown = line[:80].decode(errors="replace").strip()
                    raise ValueError(
                        f"{self.path}, line {number}: {shown!r} is no row with uid and correct (true, false or a "
                        f"share); {_cure(self.path)}"
                    )
                right, rows, _ = found.get(uid, (0.0, 0, None))
                found[uid] = (right + correct, rows + 1, None if text is None else _digest(text))
        return found

    def __call__(self, uids: Sequence[str]) -> Tensor:
        """(B,) bool, rows whose prompt the teacher solves often enough.

        Args:
            uids: (B,) of the prompts.

        Raises:
            ValueError: prompts that the file does not have.
        """
        self._refuse([uid for uid in dict.fromkeys(uids) if uid not in self.rates], len(set(uids)))
        return torch.tensor([self.rates[uid] >= self.at_least for uid in uids], dtype=torch.bool)

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Compare the file with all training prompts, before the first rollout.

        Raises:
            ValueError: the file lacks some of them, or has another prompt under the uid of one.
        """
        prompts = list(prompts)
        self._refuse([prompt.uid for prompt in prompts if prompt.uid not in self.rates], len(prompts))
        for prompt in prompts:
            if self._read[prompt.uid][2] not in (None, _digest(prompt.text)):
                raise ValueError(
                    f"{self.path} has responses to another prompt under the name {prompt.uid!r} than the training "
                    f"prompt {prompt.text[:80]!r}; {_cure(self.path)}"
                )

    def _refuse(self, missing: Sequence[str], of: int) -> None:
        if missing:
            raise ValueError(
                f"{len(missing)} of {of} training prompts are not in {self.path}, which has {len(self.rates)} (the "
                f"first: {missing[0]!r}); {_cure(self.path)}"
            )


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _cure(path: str) -> str:
    return (
        "let the teacher answer all training prompts: kdrl predict --config (that of the run) --rollout.policy teacher "
        f"--output {path}, with the sets of data.train under data.predict"
    )
