"""Triton kernels of percov2, installed as ``percov2.triton_kernels``.

Importing this package needs neither triton nor a GPU; calling a kernel needs both (the extra
``gpu``), or TRITON_INTERPRET=1 in the environment before the first call to run on CPU tensors.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["nearest_codes", "symbol_intervals"]


def _kernel(name: str) -> ModuleType:
    """A module of kernels. Raises RuntimeError if triton is not installed."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise RuntimeError(
            "the GPU kernels need triton, which is not installed: pip install 'percov2[gpu]'"
        ) from error


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the codebook vector with the greatest cosine similarity; the lowest wins ties.

    vectors: float32 [N, D], of any length (scaling a vector moves no maximum); codebook: float32
    [K, D], unit vectors. Returns int32 [N] in 0 .. K - 1. Raises RuntimeError if triton is not
    installed and ValueError for wrong shapes, dtypes or devices.
    """
    result: torch.Tensor = _kernel("nearest").launch(vectors, codebook)
    return result


def symbol_intervals(
    logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interval of one symbol per row of logits: starts and freqs, int32 [...].

    logits [..., V]: int16 to base 2 with 8 fractional bits, or float32 or bfloat16 to base e, which
    are rounded to those first; symbols: int32 [...]; table: int32 [256], percov2.entropy.cdf's
    WEIGHT_TABLE. The intervals are those of percov2.entropy.cdf. A freq of 0 marks what cannot be
    coded: a symbol outside of 0 .. V - 1, a row with NaN or +inf or nothing finite; the host would
    have to wait to raise an error. Raises RuntimeError if triton is not installed and ValueError
    for wrong shapes, dtypes, devices or prob_bits.
    """
    result: tuple[torch.Tensor, torch.Tensor] = _kernel("intervals").launch(
        logits, symbols, prob_bits, table
    )
    return result
