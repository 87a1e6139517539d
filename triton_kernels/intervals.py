"""The fused kernel from logits to the interval of one symbol per row.

Let d = max(logits) - logit and w = table[d & 255] >> (d >> 8), which is 0 from 22 octaves on. With
prefix sums P of w, their total S and M = 2^prob_bits, the interval of symbol s in a codebook of V
begins at floor(P_s (M - V) / S) + s and ends where the next interval begins (percov2.entropy.cdf).
A row is read once and stays in registers. Only two values of P are needed, so one masked sum
replaces the scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from percov2.triton_kernels.placement import padded, pieces, queue, require_runnable

MAX_CODEBOOK = 8192
TILE = 4096
"""Logits per program: 32 per thread."""

INT16, BFLOAT16, FLOAT32 = 0, 1, 2
_KINDS = {torch.int16: INT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}


@triton.jit
def corrected_quotient(numerator, divisor, estimate):
    """Return floor(numerator / divisor) from an estimate that is off by at most one.

    All are int64.
    """
    rest = numerator - estimate * divisor
    return estimate - (rest < 0).to(tl.int64) + (rest >= divisor).to(tl.int64)


@triton.jit
def quotient(numerator, divisor):
    """Return floor(numerator / divisor) for int64 values.

    It requires 0 <= numerator < 2^55, 1 <= divisor < 2^35 and a quotient of at most 2^20. Each of
    the two roundings to float32 has a relative error of 2^-24, and the fastest division of a GPU
    has 2^-22 (two units in the last place). Together this is less than 2^-21. So the estimate is
    off by less than 1/2 before it is truncated, and by at most one afterwards.
    """
    estimate = (numerator.to(tl.float32) / divisor.to(tl.float32)).to(tl.int64)
    return corrected_quotient(numerator, divisor, estimate)


@triton.jit
def read_logits(pointers, mask, KIND: tl.constexpr):
    """Load int16 logits as int32, and other logits as float32.

    Values outside the mask are the lowest value. The mask is applied after loading, because Triton
    3.6 fills pairs of 16-bit values wrongly with a negative ``other``: every second value becomes
    -1.
    """
    if KIND == 0:
        values = tl.where(mask, tl.load(pointers, mask=mask, other=0).to(tl.int32), -32768)
    elif KIND == 1:
        read = tl.load(pointers, mask=mask, other=0).to(tl.int32)
        bits = tl.where(mask, read, -128) << 16  # -128: -inf
        values = bits.to(tl.float32, bitcast=True)
    else:
        values = tl.load(pointers, mask=mask, other=float("-inf"))
    return values


@triton.jit
def octave_steps(logits, top, KIND: tl.constexpr):
    """Return the distance of logits to the largest of their row, int32 in 1/256 of an octave."""
    if KIND == 0:
        steps = top - logits
    else:
        # This rounds to the nearest, ties to even: |scaled| <= 2^15, and adding 1.5 * 2^23 leaves
        # no bits for a fraction. The clamp prevents a fused product and sum.
        scaled = tl.maximum((logits - top) * 369.329925537109375, -32768.0)
        steps = -((scaled + 12582912.0) - 12582912.0).to(tl.int32)
    return steps


@triton.jit
def symbol_weights(table, steps, mask):
    """Return the 22-bit weights as uint32. They are 0 outside the mask."""
    known = tl.load(table + (steps & 255), mask=mask & (steps < 5632), other=0)
    return known.to(tl.uint32) >> ((steps >> 8) & 31).to(tl.uint32)


@triton.jit
def intervals_kernel(
    logits,
    symbols,
    table,
    starts,
    freqs,
    rows,
    spread,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Map logits [rows, SIZE] and symbols, int32 [rows], to starts and freqs, int32 [rows].

    table is int32 [256], and spread is 2^prob_bits - SIZE.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = row < rows
    column = tl.arange(0, BLOCK_SIZE)
    inside = real[:, None] & (column < SIZE)[None, :]
    values = read_logits(logits + row[:, None] * SIZE + column[None, :], inside, KIND)
    symbol = tl.load(symbols + row, mask=real, other=0)
    valid = real & (symbol >= 0) & (symbol < SIZE)
    own = read_logits(logits + row * SIZE + symbol, valid, KIND)
    top = tl.max(values, axis=1)
    if KIND != 0:
        strange = tl.sum((inside & (values != values)).to(tl.int32), axis=1)
        valid = valid & (strange == 0) & (tl.abs(top) < float("inf"))
        top = tl.where(valid, top, 0.0)
        values = tl.where(valid[:, None], values, 0.0)  # NaN and inf do not convert to int32
        own = tl.where(valid, own, 0.0)
    weights = symbol_weights(table, octave_steps(values, top[:, None], KIND), inside)
    own_weight = symbol_weights(table, octave_steps(own, top, KIND), valid).to(tl.int64)
    if SIZE > 1024:  # 1024 weights below 2^22 sum to less than 2^32
        weights = weights.to(tl.int64)
    total = tl.sum(weights, axis=1).to(tl.int64)
    below = tl.sum(tl.where(column[None, :] < symbol[:, None], weights, 0), axis=1).to(tl.int64)
    total = tl.maximum(total, 1)  # rows beyond the last have a total of 0
    start = quotient(below * spread, total)
    end = quotient((below + own_weight) * spread, total)
    freq = (end - start).to(tl.int32) + 1
    tl.store(starts + row, tl.where(valid, start.to(tl.int32) + symbol, 0), mask=real)
    tl.store(freqs + row, tl.where(valid, freq, 0), mask=real)


def block_sizes(size: int) -> tuple[int, int, int]:
    """Return the numbers of rows, padded columns and warps per program.

    ``size`` is the number of codebook entries.
    """
    columns = max(padded(size), 16)
    return max(TILE // columns, 1), columns, 4 if columns <= TILE else 8


def launch(
    logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int, table: torch.Tensor
) -> torch.Tensor:
    """Check the arguments of percov2.triton_kernels.symbol_intervals and run the kernel."""
    if logits.dtype not in _KINDS:
        raise ValueError(f"logits have dtype {logits.dtype}; they must be int16, bfloat16, float32")
    size = logits.shape[-1] if logits.dim() else 0
    if not 2 <= size <= MAX_CODEBOOK:
        raise ValueError(f"the codebook has {size} entries; it must have 2 to {MAX_CODEBOOK}")
    if not 8 <= prob_bits <= 20 or 1 << prob_bits < 2 * size:
        raise ValueError(
            f"prob_bits is {prob_bits}; it must be 8 to 20, and 2^prob_bits at least twice the "
            f"codebook of {size}"
        )
    if symbols.dtype != torch.int32 or symbols.shape != logits.shape[:-1]:
        raise ValueError(
            f"symbols are {symbols.dtype} {tuple(symbols.shape)} for logits of "
            f"{tuple(logits.shape)}; they must be int32, one for each row"
        )
    if table.dtype != torch.int32 or tuple(table.shape) != (256,):
        raise ValueError(f"table is {table.dtype} {tuple(table.shape)}; it must be int32 [256]")
    require_runnable(logits=logits, symbols=symbols, table=table)
    flat = logits.contiguous()
    if logits.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    both = torch.empty(2, *symbols.shape, dtype=torch.int32, device=symbols.device)
    rows = symbols.numel()
    if rows:
        block_rows, block_size, warps = block_sizes(size)
        queue(
            intervals_kernel,
            (pieces(rows, block_rows),),
            flat,
            symbols.contiguous(),
            table.contiguous(),
            both[0],
            both[1],
            rows,
            (1 << prob_bits) - size,
            SIZE=size,
            KIND=_KINDS[logits.dtype],
            BLOCK_ROWS=block_rows,
            BLOCK_SIZE=block_size,
            num_warps=warps,
        )
    return both
