"""Secrets among the settings are used but not written down."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

MASK = "<masked>"
_NAME = re.compile(r"(^|[_.-])(token|password|passwd|passphrase|secret|api_?key|access_?key|credentials?)$", re.I)
_TOKENS_OF_TEXT = re.compile(r"(^|[_.-])(eos|bos|pad|unk|sep|cls|mask)_token$", re.I)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password


def masked(settings: Any) -> Any:
    """A copy of nested settings in which texts under names like `api_key`, and passwords in URLs, are `MASK`."""
    return _mask(deepcopy(settings), "")


def refuse_masked(settings: Any) -> None:
    """Check that no setting still stands as a saved config left it.

    Raises:
        ValueError: names those to be given again.
    """
    if names := [f"--{name}" for name in _masked_names(settings)]:
        raise ValueError(
            f"{', '.join(names)}: saved configs do not hold secrets; give the value again on the command line"
        )


def _mask(value: Any, name: str) -> Any:
    if isinstance(value, str) and value:
        if _NAME.search(name) and not _TOKENS_OF_TEXT.search(name):
            return MASK
        return _IN_URL.sub(MASK, value)
    if isinstance(value, list):
        return [_mask(item, name) for item in value]
    fields = _fields(value)
    for key, item in list(fields.items()):
        fields[key] = _mask(item, str(key))
    return value


def _masked_names(value: Any, name: str = "") -> list[str]:
    if isinstance(value, str):
        return [name] if MASK in value else []
    items = enumerate(value) if isinstance(value, list) else _fields(value).items()
    return [found for key, item in items for found in _masked_names(item, f"{name}.{key}" if name else str(key))]


def _fields(value: Any) -> dict[Any, Any]:
    """The entries of a mapping or of a parser's namespace, to be changed in place."""
    if isinstance(value, dict):
        return value
    return vars(value) if type(value).__name__ == "Namespace" else {}
