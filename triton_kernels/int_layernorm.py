"""The integer LayerNorm of docs/reference/entropy-model.md: int32 residual -> int8 in one pass.

The results are exact integers. Float divisions and roots have errors that differ between GPUs.
Therefore floats only give guesses, which exact integer remainders correct. A docstring or a comment
states the error bound of each guess.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from percov2.triton_kernels.placement import padded, pieces, queue, require_runnable

MAX_DIM = 1024
TILE = 2048
"""Numbers per program: 16 per thread."""


@triton.jit
def settled_root(value, root):
    """Return floor(sqrt(value)) from a root that is off by at most one.

    Both are int64, and the value is below 2^50.
    """
    root -= (root * root > value).to(tl.int64)
    return root + ((root + 1) * (root + 1) <= value).to(tl.int64)


@triton.jit
def corrected_root(value, guess):
    """Return floor(sqrt(value)) for int64 values below 2^50, from a guess that is off by < 64.

    A Newton step gives sqrt(value) + e^2 / (2 g) for a guess g (int64) that is off by e. For
    g >= 2^12, e^2 / (2 g) < 1/2. Smaller guesses are off by less than one, so e^2 / (2 g) <= 1/2.
    The step's quotient is below 64, so its division errs by less than 2^-10. The result of the step
    is therefore off by at most one.
    """
    safe = tl.maximum(guess, 1)
    step = (value - safe * safe).to(tl.float32) / (2 * safe).to(tl.float32)
    return settled_root(value, safe + tl.floor(step).to(tl.int64))


@triton.jit
def integer_root(value):
    """Return floor(sqrt(value)) for int64 values in 0 .. 2^50.

    Relative to the root, rounding to float32 errs by 2^-25 and the fastest square root of a GPU by
    2^-22. Together this is less than 16 for roots up to 2^25, and less than 1/2 below 2^20.
    """
    return corrected_root(value, tl.sqrt(value.to(tl.float32)).to(tl.int64))


@triton.jit
def rounded_quotient(product, root, guess):
    """Return clamp(floor((product + floor(root / 2)) / root), -127, 127), all int32.

    |product| is below 2^32, and ``product`` is given modulo 2^32. The guess of a quotient in
    -128 .. 128 is off by at most one. Its remainder lies in -root .. 2 root - 1, and root < 2^26,
    so the remainder is exact modulo 2^32. For other quotients the guess is the nearer limit. A
    meaningless remainder then changes the guess by at most one, which the clamp hides.
    """
    rest = product + (root >> 1) - guess * root
    quotient = guess - (rest < 0).to(tl.int32) + (rest >= root).to(tl.int32)
    return tl.minimum(tl.maximum(quotient, -127), 127)


@triton.jit
def int_layernorm_kernel(
    residual,
    gain,
    out,
    rows,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Compute int8 [rows, DIM] in +-127 from a residual and a gain.

    ``residual`` is int32 [rows, DIM] in +-2^20, and ``gain`` is int16 [DIM].
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    place = row[:, None] * DIM + column[None, :]
    value = tl.load(residual + place, mask=inside, other=0)
    # The sum is shifted so that the division has no negative operand: < 2^31 + 2^10, so unsigned.
    shifted = (tl.sum(value, axis=1) + (DIM // 2)).to(tl.uint32) + (DIM << 20)
    # Triton 3.1 requires an unsigned divisor for an unsigned number.
    mean = (shifted // tl.full([1], DIM, tl.uint32)).to(tl.int32) - (1 << 20)
    y = tl.where(inside, value - mean[:, None], 0)
    wide = y.to(tl.int64)
    energy = tl.sum(wide * wide, axis=1)  # < 2^51
    root = integer_root((energy << 8) // DIM).to(tl.int32) + 1
    factor = tl.load(gain + column, mask=column < DIM, other=0).to(tl.int32)
    product = y * factor[None, :]  # modulo 2^32
    # The floats are exact, the product errs by 2^-24 and the inverse by 2^-22, relatively. So
    # guesses below 256 err by less than 2^-10.
    inverse = 1.0 / root.to(tl.float32)
    guess = y.to(tl.float32) * factor.to(tl.float32)[None, :] * inverse[:, None] + 0.5
    guess = tl.floor(tl.minimum(tl.maximum(guess, -128.0), 128.0)).to(tl.int32)
    tl.store(out + place, rounded_quotient(product, root[:, None], guess).to(tl.int8), mask=inside)


def block_sizes(dim: int) -> tuple[int, int]:
    """Return the number of rows and of padded columns per program."""
    columns = max(padded(dim), 16)
    return TILE // columns, columns


def launch(residual: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Check the arguments of percov2.triton_kernels.layer_norm and run the kernel."""
    dim = residual.shape[-1] if residual.dim() else 0
    if residual.dtype != torch.int32 or not 1 <= dim <= MAX_DIM:
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)}; it must be int32 with a last "
            f"axis of 1 to {MAX_DIM}"
        )
    if gain.dtype != torch.int16 or tuple(gain.shape) != (dim,):
        raise ValueError(f"gain is {gain.dtype} {tuple(gain.shape)}; it must be int16 [{dim}]")
    require_runnable(residual=residual, gain=gain)
    out = torch.empty(residual.shape, dtype=torch.int8, device=residual.device)
    rows = residual.numel() // dim
    if rows:
        block_rows, block_dim = block_sizes(dim)
        queue(
            int_layernorm_kernel,
            (pieces(rows, block_rows),),
            residual.contiguous(),
            gain.contiguous(),
            out,
            rows,
            DIM=dim,
            BLOCK_ROWS=block_rows,
            BLOCK_DIM=block_dim,
        )
    return out
