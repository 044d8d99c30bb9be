"""The rows of rollouts on disk: what was asked, answered, judged and scored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kdrl_pl.data.prompts import Prompt
from kdrl_pl.experience import Experience
from kdrl_pl.files import json_line, replacing


class RolloutFiles:
    """The rows of every rollout, `000123.jsonl`; rank r > 0 writes `000123-rank<r>.jsonl`.

    Every file is replaced as a whole, so a rollout that is repeated after a resume takes the place of the first.

    Args:
        folder: where the files lie; made on the first write.
        keep: number of newest rollouts that stay on disk; 0 writes none, -1 keeps all.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self, folder: str | Path, keep: int = -1, rank: int = 0, world_size: int = 1) -> None:
        if keep < -1:
            raise ValueError(f"keep={keep}; expected a number of rollouts, 0 for none or -1 for all")
        self.folder = Path(folder)
        self.keep = keep
        self.rank = rank
        self.world_size = world_size

    def path(self, rollout: int) -> Path:
        """The file of this rank for `rollout`."""
        return self.folder / f"{rollout:06d}{f'-rank{self.rank}' if self.rank else ''}.jsonl"

    def write(self, rollout: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of `rollout` (see `rollout_rows`) and delete the oldest files beyond `keep`."""
        if self.keep == 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.path(rollout)) as file:
            file.writelines(json_line(row) for row in rows)
        if self.keep > 0:
            mine = self._files()
            oldest = sorted({number for number, _ in mine})[-self.keep :][0]
            for number, path in mine:
                if number < oldest:
                    path.unlink()

    def truncate_after(self, rollout: int) -> None:
        """Delete the files of `rollout` and later ones: what a resumed run does again. Every rank calls it."""
        for number, path in self._files():
            if number >= rollout:
                path.unlink()

    def _files(self) -> list[tuple[int, Path]]:
        """(rollout, path) of this rank's files, and its share of those that more ranks left in an earlier run."""
        if not self.folder.is_dir():
            return []
        found = []
        for path in self.folder.iterdir():
            match = re.fullmatch(r"(\d{6,})(?:-rank(\d+))?\.jsonl", path.name)
            if match and int(match[2] or 0) % self.world_size == self.rank:
                found.append((int(match[1]), path))
        return found


class NonFiniteRollouts:
    """Rollouts in which a number was not finite, for replay: `rollout-000123.pt`, rank r > 0 `…-rank<r>.pt`.

    `Experience.load` reads them; `KDRLModule.loss` on the student of the checkpoint before gives the same numbers.

    Args:
        folder: where the files lie; made on the first write.
        rank: number of this process.
        keep: number of newest files of this rank that stay on disk.
    """

    def __init__(self, folder: str | Path, rank: int = 0, keep: int = 5) -> None:
        self.folder, self.rank, self.keep = Path(folder), rank, keep

    def write(self, rollout: int, experience: Experience) -> None:
        """Keep these rows, and delete the oldest files beyond `keep`."""
        suffix = f"-rank{self.rank}" if self.rank else ""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"rollout-{rollout:06d}{suffix}.pt") as file:
            experience.save(file)
        mine = [p for p in self.folder.iterdir() if re.fullmatch(rf"rollout-\d+{suffix}\.pt", p.name)]
        for path in sorted(mine, key=lambda p: (len(p.name), p.name))[: -self.keep]:
            path.unlink()


def rollout_rows(
    rollout: int,
    experience: Experience,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    parts: Mapping[str, Sequence[float | None]] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per completion, for `RolloutFiles.write` and for `kdrl predict`.

    Log-probs are in nats, one number per entry of `response_ids`, rounded to 6 significant digits; null when the run
    has none. `token_weight` and `kd_weights` (one per entry of `response_ids`; 0 = not distilled) are what the loss
    multiplies its two halves by; null in evaluation. `prompt_ids` and `response_ids` go back into
    `Experience.from_rows`. `teacher` is there where one was named.

    Args:
        rollout: its number.
        experience: B rows.
        prompts: the prompts they answer, found by uid.
        completions: (B,) texts of the responses.
        parts: reward -> (B,) values before their weights.

    Raises:
        ValueError: another number of completions or parts than rows, or a uid that no prompt has.
    """
    rows = experience.to("cpu")
    lengths = {"completions": len(completions), **{name: len(values) for name, values in (parts or {}).items()}}
    for name, length in lengths.items():
        if length != len(rows):
            raise ValueError(f"{name} has {length} entries; expected one per row of the experience ({len(rows)})")
    texts = {prompt.uid: prompt.text for prompt in prompts}
    if unknown := set(rows.uids) - set(texts):
        raise ValueError(f"the experience has rows of {min(unknown)!r}, which is not among the {len(texts)} prompts")
    for i, uid in enumerate(rows.uids):
        sampled = rows.response_mask[i]
        logprobs = {
            name: None if values is None else [float(f"{value:.6g}") for value in values[i][sampled].tolist()]
            for name in ("behavior_logprobs", "old_logprobs", "teacher_logprobs")
            for values in [getattr(rows, name)]
        }
        distilled = None if rows.kd_weights is None else rows.kd_weights[i][sampled].tolist()
        yield {
            "rollout": rollout,
            "uid": uid,
            "group": int(rows.group[i]),
            "prompt": texts[uid],
            "completion": completions[i],
            "reward": _six_digits(rows.rewards[i]),
            "parts": {name: values[i] for name, values in (parts or {}).items()},
            "correct": bool(rows.correct[i]),
            "truncated": bool(rows.truncated[i]),
            "advantage": None if rows.advantages is None else _six_digits(rows.advantages[i]),
            "prompt_ids": rows.input_ids[i][rows.attention_mask[i] & ~sampled].tolist(),
            "response_ids": rows.input_ids[i][sampled].tolist(),
            **logprobs,
            "token_weight": None if rows.token_weights is None else _six_digits(rows.token_weights[i]),
            "kd_weights": None if distilled is None else [float(f"{weight:.4g}") for weight in distilled],
            **({"teacher": rows.teachers[i]} if rows.teachers[i] else {}),
        }


def _six_digits(value: Tensor) -> float:
    return float(f"{value.item():.6g}")
