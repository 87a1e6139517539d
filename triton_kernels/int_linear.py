"""A quantized linear map: int8 product, requantization and the next operation, in one kernel.

The kernel computes acc = bias + sum weight * x (int8 tensor cores, exact in int32, |acc| < 2^24)
and then clamp((acc * multiplier + 2^(shift - 1)) >> shift), all in int32
(docs/reference/entropy-model.md). It stores the result as int8 or int16, looks it up in a table of
256 bytes, or adds it to a residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from percov2.triton_kernels.placement import padded, pieces, queue, require_runnable

MAX_TERMS = 1040
RESIDUAL_LIMIT = 2**20
STORE, TABLE, RESIDUAL = 0, 1, 2
"""The operations that may follow a requantization."""


@triton.jit
def int_linear_kernel(
    x,
    weight,
    bias,
    multiplier,
    shift,
    extra,
    out,
    rows,
    outputs,
    TERMS: tl.constexpr,
    LIMIT: tl.constexpr,
    END: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
):
    """Map x, int8 [rows, TERMS], to out [rows, outputs].

    The outputs are in -LIMIT .. LIMIT, or in the whole range of int16. weight is int8 [outputs,
    TERMS], bias is int32 [outputs], and multiplier and shift are int8 [outputs]. extra is int8
    [256] if END is 1, and int32 [rows, outputs] if END is 2.
    """
    blocks = tl.cdiv(outputs, BLOCK_OUTPUTS)
    # Neighbours share rows of x, the larger operand.
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = tl.program_id(0) % blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    term = tl.arange(0, BLOCK_TERMS)
    there, wanted = row < rows, output < outputs
    acc = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.int32)
    for first in range(0, TERMS, BLOCK_TERMS):
        known = first + term < TERMS
        left = tl.load(
            x + row[:, None] * TERMS + (first + term)[None, :],
            mask=there[:, None] & known[None, :],
            other=0,
        )
        right = tl.load(
            weight + output[None, :] * TERMS + (first + term)[:, None],
            mask=wanted[None, :] & known[:, None],
            other=0,
        )
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
    factor = tl.load(multiplier + output, mask=wanted, other=1).to(tl.int32)
    bits = tl.load(shift + output, mask=wanted, other=1).to(tl.int32)
    half = (tl.full([BLOCK_OUTPUTS], 1, tl.int32) << bits) >> 1
    acc += tl.load(bias + output, mask=wanted, other=0)[None, :]
    result = (acc * factor[None, :] + half[None, :]) >> bits[None, :]
    inside = there[:, None] & wanted[None, :]
    place = row[:, None] * outputs + output[None, :]
    # The range of int16 is not symmetric.
    low = -LIMIT - 1 if LIMIT == 32767 else -LIMIT
    result = tl.minimum(tl.maximum(result, low), LIMIT)
    if END == 1:
        result = tl.load(extra + (result + 128), mask=inside, other=0).to(tl.int32)
    elif END == 2:
        result += tl.load(extra + place, mask=inside, other=0)
        result = tl.minimum(tl.maximum(result, -(1 << 20)), 1 << 20)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def block_sizes(rows: int, terms: int) -> tuple[int, int, int, int]:
    """Return the numbers of rows, outputs, terms and warps of a tile.

    If there are few rows, only small tiles fill a GPU.
    """
    block_terms = min(max(padded(terms), 32), 128)
    return (128, 64, block_terms, 8) if rows > 1024 else (32, 32, block_terms, 4)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor,
) -> None:
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be int8 [n, K]")
    outputs, terms = weight.shape
    if not 1 <= terms <= MAX_TERMS or not outputs:
        raise ValueError(f"weight is {outputs} x {terms}; it must have 1 to {MAX_TERMS} terms")
    if x.dtype != torch.int8 or x.dim() == 0 or x.shape[-1] != terms:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be int8 [..., {terms}]")
    for name, tensor, dtype in (
        ("bias", bias, torch.int32),
        ("multiplier", multiplier, torch.int8),
        ("shift", shift, torch.int8),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != (outputs,):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} [{outputs}]"
            )


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor,
    table: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Check the arguments of percov2.triton_kernels.linear and run the kernel."""
    _check(x, weight, bias, multiplier, shift)
    outputs, terms = weight.shape
    x, shape = x.contiguous(), (*x.shape[:-1], outputs)
    end, limit, extra = STORE, 127, x
    if table is not None and residual is not None:
        raise ValueError("give a table or a residual, not both")
    if table is not None:
        end, extra, dtype = TABLE, table, torch.int8
        if table.dtype != torch.int8 or tuple(table.shape) != (256,):
            raise ValueError(f"table is {table.dtype} {tuple(table.shape)}; it must be int8 [256]")
    elif residual is not None:
        end, limit, extra, dtype = RESIDUAL, RESIDUAL_LIMIT, residual, torch.int32
        if residual.dtype != torch.int32 or tuple(residual.shape) != shape:
            raise ValueError(
                f"residual is {residual.dtype} {tuple(residual.shape)}; it must be int32 {shape}"
            )
    elif dtype == torch.int16:
        limit = 2**15 - 1
    elif dtype not in (None, torch.int8):
        raise ValueError(f"dtype is {dtype}; it must be int8 or int16")
    require_runnable(x=x, weight=weight, bias=bias, multiplier=multiplier, shift=shift, extra=extra)
    out = torch.empty(shape, dtype=dtype or torch.int8, device=x.device)
    rows = x.numel() // terms
    if rows:
        block_rows, block_outputs, block_terms, warps = block_sizes(rows, terms)
        grid = pieces(rows, block_rows) * pieces(outputs, block_outputs)
        queue(
            int_linear_kernel,
            (grid,),
            x,
            weight.contiguous(),
            bias.contiguous(),
            multiplier.contiguous(),
            shift.contiguous(),
            extra.contiguous(),
            out,
            rows,
            outputs,
            TERMS=terms,
            LIMIT=limit,
            END=end,
            BLOCK_ROWS=block_rows,
            BLOCK_OUTPUTS=block_outputs,
            BLOCK_TERMS=block_terms,
            num_warps=warps,
        )
    return out
