"""Frozen weights in 8 or 4 bits, through bitsandbytes."""

from __future__ import annotations

import logging
from typing import Any

from kdrl_pl.models.loading import DTYPES

QUANTIZATIONS = ("8bit", "4bit")


def check_quantization(setting: str, value: str | None) -> str | None:
    """`value`, once it is sure to be one that we know.

    Raises:
        ValueError: it is not.
    """
    if value is not None and value not in QUANTIZATIONS:
        raise ValueError(f"{setting} is {value!r}; expected null, {' or '.join(QUANTIZATIONS)}")
    return value


def quantization_arguments(quantization: str | None, dtype: str, int8_threshold: float = 0.0) -> dict[str, Any] | None:
    """Arguments of transformers' `BitsAndBytesConfig`; None where nothing is quantised.

    Args:
        quantization: "8bit" (LLM.int8), "4bit" (nf4) or None.
        dtype: what the 4-bit form computes in: "float32", "bfloat16" or "float16".
        int8_threshold: outlier threshold of the 8-bit form; 0 keeps rows independent of each other.
    """
    if quantization is None:
        return None
    quieten_bitsandbytes()
    if quantization == "8bit":
        return {"load_in_8bit": True, "llm_int8_threshold": int8_threshold}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": DTYPES[dtype]}


def quieten_bitsandbytes() -> None:
    """It warns on every matrix product on the CPU, and when it finds no faster kernel."""
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
