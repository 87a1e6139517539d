"""The nearest codebook vector by cosine similarity.

Every program reads the codebook in tiles of BLOCK_K and keeps the best value and index of its
BLOCK_N vectors. The [N, K] similarities are never written to memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from percov2.triton_kernels.placement import pieces, queue, require_runnable

# Larger tiles exceed the registers of sm_80: 64 x 64 needs a stack.
BLOCK_N = 32
BLOCK_K = 32
BLOCK_D = 32


@triton.jit
def nearest_kernel(
    vectors,
    codebook,
    indices,
    rows,
    codes,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # Triton reads annotations of pointers and sizes as values, so there are none
    """Map vectors [rows, dim] and codebook [codes, dim], float32 row-major, to int32 [rows]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    axis = tl.arange(0, BLOCK_D)
    best_value = tl.full([BLOCK_N], float("-inf"), tl.float32)
    best_index = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, codes, BLOCK_K):
        code = first + column
        similarity = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for d in range(0, dim, BLOCK_D):
            inside = (d + axis) < dim
            left = tl.load(
                vectors + row[:, None] * dim + (d + axis)[None, :],
                mask=(row[:, None] < rows) & inside[None, :],
                other=0.0,
            )
            right = tl.load(
                codebook + code[None, :] * dim + (d + axis)[:, None],
                mask=(code[None, :] < codes) & inside[:, None],
                other=0.0,
            )
            # TF32 could swap near neighbours. Then the tokens would differ from those of the CPU.
            similarity += tl.dot(left, right, input_precision="ieee")
        similarity = tl.where(code[None, :] < codes, similarity, float("-inf"))
        value, position = tl.max(
            similarity, axis=1, return_indices=True, return_indices_tie_break_left=True
        )
        # Strictly greater, so that the earlier of two equal similarities wins.
        better = value > best_value
        best_index = tl.where(better, first + position, best_index)
        best_value = tl.where(better, value, best_value)
    tl.store(indices + row, best_index, mask=row < rows)


def launch(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Check the arguments of percov2.triton_kernels.nearest_codes and run the kernel."""
    for name, tensor in (("vectors", vectors), ("codebook", codebook)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have two axes")
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be torch.float32")
    rows, dim = vectors.shape
    codes = codebook.shape[0]
    if codebook.shape[1] != dim:
        raise ValueError(f"vectors have {dim} components and codebook vectors {codebook.shape[1]}")
    if codes == 0 or dim == 0:
        raise ValueError(f"the codebook has shape {tuple(codebook.shape)}; it must not be empty")
    if codes * dim >= 2**31:
        raise ValueError(f"the codebook has {codes * dim} numbers; it must have fewer than 2^31")
    require_runnable(vectors=vectors, codebook=codebook)
    indices = torch.empty(rows, dtype=torch.int32, device=vectors.device)
    if rows:
        queue(
            nearest_kernel,
            (pieces(rows, BLOCK_N),),
            vectors.contiguous(),
            codebook.contiguous(),
            indices,
            rows,
            codes,
            dim,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            BLOCK_D=BLOCK_D,
        )
    return indices
