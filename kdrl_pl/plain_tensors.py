"""Reading files of tensors that others may have written: they can hold plain values only, and nothing that runs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def load_plain(path: str | Path, mmap: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU.

    Args:
        path: the file.
        mmap: leave tensors on the disk until they are read.

    Raises:
        ValueError: see `only_plain`.
    """
    with only_plain(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


@contextmanager
def only_plain(path: Any) -> Iterator[None]:
    """What a `torch.load(..., weights_only=True)` inside says of the file, with its name and in plain words.

    Raises:
        ValueError: the file holds more than tensors, numbers and text, or is damaged.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, numbers and text, so it is not loaded: it could run code. "
            "Files of this library do not"
        ) from error
    except (EOFError, RuntimeError) as error:  # a torn archive
        raise ValueError(f"{path} is damaged, or no file of tensors: {str(error).partition(chr(10))[0]}") from error
