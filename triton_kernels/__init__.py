"""Triton kernels of percov2, installed as ``percov2.triton_kernels``.

Importing this package needs neither triton nor a GPU. Calling a kernel needs triton (the extra
``gpu``) and a GPU. To run kernels on CPU tensors, set TRITON_INTERPRET=1 before the first call.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = [
    "attention",
    "attention_blocks",
    "check_device",
    "layer_norm",
    "linear",
    "nearest_codes",
    "symbol_intervals",
]


@cache
def _kernel(name: str) -> ModuleType:
    """Import a module of kernels. Raise RuntimeError if triton is not installed."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise RuntimeError(
            "the GPU kernels need triton, which is not installed: pip install 'percov2[gpu]'"
        ) from error


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the index of the codebook vector with the greatest cosine similarity, int32 [N].

    The lowest index wins a tie.

    Args:
        vectors: float32 [N, D]. Their length does not matter.
        codebook: float32 [K, D], unit vectors.

    Raises:
        RuntimeError: triton is not installed.
        ValueError: a wrong shape, dtype or device.
    """
    result: torch.Tensor = _kernel("nearest").launch(vectors, codebook)
    return result


def symbol_intervals(
    logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int, table: torch.Tensor
) -> torch.Tensor:
    """Return the interval of one symbol per row of logits: starts and freqs, int32 [2, ...].

    percov2.entropy.cdf defines the intervals. A freq of 0 marks a symbol outside 0 .. V - 1, or a
    row with NaN, with +inf or without a finite value, because an error would wait for the device.

    Args:
        logits: [..., V]. int16 logits are to base 2 with 8 fractional bits. float32 and bfloat16
            logits are to base e, and are first rounded to int16 logits.
        symbols: int32 [...].
        prob_bits: precision of the intervals, 8 to 20.
        table: int32 [256], the WEIGHT_TABLE of percov2.entropy.cdf.

    Raises:
        RuntimeError: triton is not installed.
        ValueError: a wrong shape, dtype, device or ``prob_bits``.
    """
    result: torch.Tensor = _kernel("intervals").launch(logits, symbols, prob_bits, table)
    return result


def check_device(device: torch.device) -> None:
    """Raise an error if the kernels cannot run on the device.

    Raises:
        RuntimeError: triton is not installed.
        ValueError: kernels cannot run on the device.
    """
    _kernel("placement").require_device("the model", device)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor,
    *,
    table: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Apply an integer linear map and the next operation (docs/reference/entropy-model.md).

    Args:
        x: int8 [..., K] in +-127, with K <= 1040.
        weight: int8 [n, K].
        bias: int32 [n]. For every output, 127 sum |weight| + |bias| must be below 2^24, which is
            not checked.
        multiplier: int8 [n] in 1 .. 127.
        shift: int8 [n] in 1 .. 24.
        table: int8 [256], or None. With a table, the result is table[y + 128] for the outputs y in
            +-127, int8.
        residual: int32 [..., n] in +-2^20, or None. With a residual, the result is the saturated
            sum, int32, in a new tensor.
        dtype: dtype of the outputs without table and residual. None or int8 means outputs in
            +-127, and int16 means outputs in the whole range of int16.

    Returns:
        [..., n].

    Raises:
        RuntimeError: triton is not installed.
        ValueError: a wrong shape, dtype or device.
    """
    kernel = _kernel("int_linear")
    result: torch.Tensor = kernel.launch(x, weight, bias, multiplier, shift, table, residual, dtype)
    return result


def layer_norm(residual: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Return the integer LayerNorm of docs/reference/entropy-model.md, int8 [..., d] in +-127.

    Args:
        residual: int32 [..., d] in +-2^20, with d <= 1024.
        gain: int16 [d] in +-2047.

    Raises:
        RuntimeError: triton is not installed.
        ValueError: a wrong shape, dtype or device.
    """
    result: torch.Tensor = _kernel("int_layernorm").launch(residual, gain)
    return result


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: tuple[torch.Tensor, ...],
    biases: torch.Tensor,
    shifts: torch.Tensor,
    gain_bits: int,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Return the integer attention of docs/reference/entropy-model.md, int8 [B, E, H * D].

    Args:
        queries: int8 [B, E, H * D] in +-127, with D <= 64.
        keys, values: int8 [B, at least K, H * D] in +-127. The first three keys are the start
            entries.
        plan: four int32 tensors, described below.
        biases: int16 [H, 964].
        shifts: int8 [H].
        gain_bits: 0 .. 5.
        weights: int8 [128], the WEIGHT_TABLE of percov2.entropy.ranges.

    The plan consists of reader_places [2, E] (place, reads), readers [blocks, BLOCK] (indices, or
    -1 for none), first_keys [blocks + 1] and listed_keys [3, L] (index, place, key_stage). Block i
    reads listed_keys[:, first_keys[i] : first_keys[i + 1]], whose length is a multiple of GROUP. A
    key with key_stage 2^31 - 1 is always hidden. A place is row * 2^16 + column, with row and
    column below 2^14. Start entry j has the place (2^15 - 1) * 2^16 + j and key_stage 0. The list
    of a reader contains every key that the reader sees, and may contain hidden keys. The results of
    readers in no block are undefined. Indices are not checked, because a check would wait for the
    device.

    Raises:
        RuntimeError: triton is not installed.
        ValueError: a wrong shape, dtype or device.
    """
    result: torch.Tensor = _kernel("stage_attention").launch(
        queries, keys, values, plan, biases, shifts, gain_bits, weights
    )
    return result


def attention_blocks() -> tuple[int, int]:
    """Return BLOCK, the readers per block of ``attention``, and GROUP, its keys per group."""
    kernel = _kernel("stage_attention")
    return kernel.BLOCK, kernel.GROUP
