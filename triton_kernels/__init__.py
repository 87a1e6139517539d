"""Triton kernels of percov2, installed as ``percov2.triton_kernels``.

Importing this package needs neither triton nor a GPU. Calling a kernel needs triton (the extra
``gpu``) and a GPU, or TRITON_INTERPRET=1 before the first call to run on CPU tensors.
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
    """Import a module of kernels; RuntimeError if triton is not installed."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise RuntimeError(
            "the GPU kernels need triton, which is not installed: pip install 'percov2[gpu]'"
        ) from error


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the index of the codebook vector with the greatest cosine similarity: int32 [N].

    The lowest index wins a tie. vectors: float32 [N, D], of any length; codebook: float32 [K, D],
    unit vectors. Raises RuntimeError if triton is not installed and ValueError for wrong shapes,
    dtypes or devices.
    """
    result: torch.Tensor = _kernel("nearest").launch(vectors, codebook)
    return result


def symbol_intervals(
    logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int, table: torch.Tensor
) -> torch.Tensor:
    """Return the interval of one symbol per row of logits: int32 [2, ...], starts and freqs.

    logits [..., V]: int16 to base 2 with 8 fractional bits, or float32 or bfloat16 to base e, which
    are rounded to those first; symbols: int32 [...]; table: int32 [256], WEIGHT_TABLE of
    percov2.entropy.cdf, which defines the intervals. A freq of 0 marks a symbol outside 0 .. V - 1
    or a row with NaN, +inf or nothing finite, because raising an error would wait for the device.
    Raises RuntimeError if triton is not installed and ValueError for wrong shapes, dtypes, devices
    or prob_bits.
    """
    result: torch.Tensor = _kernel("intervals").launch(logits, symbols, prob_bits, table)
    return result


def check_device(device: torch.device) -> None:
    """Raise RuntimeError without triton, and ValueError if kernels cannot run on the device."""
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
    """Return an integer linear map of x and the next operation (docs/reference/entropy-model.md).

    x int8 [..., K] in +-127, K <= 1040; weight int8 [n, K]; bias int32 [n]; multiplier int8 [n] in
    1 .. 127; shift int8 [n] in 1 .. 24; for every output 127 sum |weight| + |bias| < 2^24
    (unchecked). Returns [..., n]: with a table (int8 [256]) table[y + 128] for y in +-127, int8;
    with a residual (int32 [..., n] in +-2^20) the saturated sum, int32, a new tensor; else int8 in
    +-127 (by default) or int16 over its range. Raises RuntimeError if triton is not installed and
    ValueError for wrong shapes, dtypes or devices.
    """
    kernel = _kernel("int_linear")
    result: torch.Tensor = kernel.launch(x, weight, bias, multiplier, shift, table, residual, dtype)
    return result


def layer_norm(residual: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Return the integer LayerNorm of docs/reference/entropy-model.md.

    residual int32 [..., d] in +-2^20, d <= 1024; gain int16 [d] in +-2047. Returns int8 [..., d] in
    +-127. Raises RuntimeError if triton is not installed and ValueError for wrong shapes, dtypes or
    devices.
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

    queries int8 [B, E, H * D], keys and values int8 [B, at least K, H * D] in +-127, D <= 64; the
    first three keys are the start entries. plan, all int32: reader_places [2, E] (place, reads),
    readers [blocks, BLOCK] (indices, -1 for none), first_keys [blocks + 1] and listed_keys [3, L]
    (index, place, key_stage; key_stage 2^31 - 1 is always hidden). Block i reads listed_keys[:,
    first_keys[i] : first_keys[i + 1]], whose length is a multiple of GROUP. A place is row * 2^16 +
    column, both below 2^14; start entry j has (2^15 - 1) * 2^16 + j and key_stage 0. The list of a
    reader contains every key that it sees, and may contain hidden keys. biases int16 [H, 964],
    shifts int8 [H], gain_bits 0 .. 5, weights int8 [128] (percov2.entropy.ranges.WEIGHT_TABLE).
    Results of readers in no block are undefined. Indices are unchecked, because a check would wait
    for the device. Raises RuntimeError if triton is not installed and ValueError for wrong shapes,
    dtypes or devices.
    """
    result: torch.Tensor = _kernel("stage_attention").launch(
        queries, keys, values, plan, biases, shifts, gain_bits, weights
    )
    return result


def attention_blocks() -> tuple[int, int]:
    """Return BLOCK and GROUP of ``attention``: readers per block and keys per group."""
    kernel = _kernel("stage_attention")
    return kernel.BLOCK, kernel.GROUP
