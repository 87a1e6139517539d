"""Triton kernels of percov2, installed as ``percov2.triton_kernels``.

Importing this package needs neither triton nor a GPU. Calling a kernel needs triton (the extra
``gpu``) and a GPU. To run kernels on CPU tensors, set TRITON_INTERPRET=1 before the first call.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

__all__ = [
    "Plan",
    "attention",
    "attention_biases",
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


Plan: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]"
"""Blocks of readers and the keys that they may see: reader_places, readers, first_keys, listed_keys
and size.

- reader_places: int32 [2, E], the place and ``reads`` of every reader. A place is row * 2^16 +
  column, with row and column below 2^14.
- readers: int32 [blocks, BLOCK], indices of readers, or -1 for none.
- first_keys: int32 [blocks + 1]. Block i reads listed_keys[:, first_keys[i] : first_keys[i + 1]],
  whose length is a multiple of GROUP.
- listed_keys: int32 [3, L], the index, place and key_stage of keys. A key with key_stage 2^31 - 1
  is always hidden. Start entry j has the place (2^15 - 1) * 2^16 + j and key_stage 0.
- size: the number of keys that the blocks list, first_keys[-1] - first_keys[0].

The list of a reader contains every key that the reader sees, which must be at least one, and may
contain hidden keys. The results of readers in no block are undefined. Indices are not checked,
because a check would wait for the device.
"""


def attention_biases(plan: Plan, table: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Return the biases of all pairs of a reader and a listed key, for ``attention``.

    All images share them, so they are computed once for a plan and a layer.

    Args:
        plan: blocks of readers and their keys.
        table: int16 [H, 964] in +-2047, the biases by relative position.
        shifts: int8 [H] in 5 .. 12.

    Returns:
        int32 [H, size / GROUP, BLOCK, GROUP].

    Raises:
        RuntimeError: triton is not installed.
        ValueError: a wrong shape, dtype or device.
    """
    result: torch.Tensor = _kernel("stage_attention").launch_biases(plan, table, shifts)
    return result


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: Plan,
    biases: torch.Tensor,
    shifts: torch.Tensor,
    gain_bits: int,
    weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the integer attention of docs/reference/entropy-model.md for the readers of a plan.

    Args:
        queries: int8 [B, E, H * D] in +-127, with D <= 64.
        keys, values: int8 [B, at least K, H * D] in +-127. The first three keys are the start
            entries.
        plan: blocks of readers and their keys.
        biases: the result of ``attention_biases`` for the plan.
        shifts: int8 [H] in 5 .. 12.
        gain_bits: 0 .. 5.
        weights: int8 [129], the WEIGHT_TABLE of percov2.entropy.ranges and a 0.
        out: int8 [B, E, H * D], where the results of the plan's readers are written.

    Raises:
        RuntimeError: triton is not installed.
        ValueError: a wrong shape, dtype or device.
    """
    _kernel("stage_attention").launch(
        queries, keys, values, plan, biases, shifts, gain_bits, weights, out
    )


def attention_blocks() -> tuple[int, int]:
    """Return BLOCK, the readers per block of ``attention``, and GROUP, its keys per group."""
    kernel = _kernel("stage_attention")
    return kernel.BLOCK, kernel.GROUP
