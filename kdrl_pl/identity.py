"""What a run must have in common with the checkpoint that it goes on from."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def check_same(what: str, saved: str | None, here: str | None, cure: str, anyway: bool) -> None:
    """Refuse to resume under another teacher, tokenizer or data set.

    Args:
        what: the thing that must be the same.
        saved: its fingerprint in the checkpoint.
        here: its fingerprint in this run.
        cure: what to do about it.
        anyway: go on with a warning.

    Raises:
        ValueError: the two differ.
    """
    if saved == here:
        return
    found = f"the checkpoint was trained {what} {saved}, this run has {here}"
    if not anyway:
        raise ValueError(f"{found}; {cure}; or insist with --resume-anyway")
    log.warning("%s; resumed anyway, as asked: the run is no longer the one that was begun", found)
