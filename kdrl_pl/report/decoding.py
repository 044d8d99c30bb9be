"""The tokenizer of a run, to show its tokens as text."""

from __future__ import annotations

import logging

from kdrl_pl.report.run import Run
from kdrl_pl.report.tokens import Decode

log = logging.getLogger(__name__)


def decoder_of(run: Run) -> Decode | None:
    """Ids to text, special tokens included; None, with a warning, where the tokenizer is not there any more."""
    from kdrl_pl.models.loading import load_tokenizer

    path = (run.config.get("data") or {}).get("tokenizer") or (run.config.get("model") or {}).get("student")
    try:
        tokenizer = load_tokenizer(str(path))
    except (OSError, ValueError) as error:
        log.warning("tokens are shown as numbers: %s", error)
        return None
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))
