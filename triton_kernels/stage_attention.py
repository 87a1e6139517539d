"""Windowed, stage-masked integer attention (docs/reference/entropy-model.md, §3).

A program computes one head of BLOCK readers of one image. For each block, a plan lists the keys
that any of its readers may see, in groups of GROUP. The kernel decides from stages and positions
which keys each reader sees. The first pass over the keys finds the largest score. The second pass
computes the weights, their sum and the weighted values. There are no floats and no rescaling, so
the order of the keys does not matter.

Ranges: |q.k| <= 64 * 127^2 < 2^20, and |score| < 2^16. The sum of the weights is at most 964 * 127
< 2^17. Weighted sums are at most 127 times as large, which is below 2^24. The numerator of the mean
is in 0 .. 2^31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from percov2.triton_kernels.placement import padded, queue, require_runnable

START_ENTRIES = 3
TABLE_SIZE = 964
"""Number of biases of a head, for 31 * 31 relative positions and the start entries."""
MAX_HEAD_DIM = 64
BLOCK = 32
"""Readers per program."""
GROUP = 32
"""Keys per step. The plan pads its lists to multiples of this number."""
IMAGES = 65535
"""Largest number of images per launch, which is CUDA's limit along the third axis of a grid."""


@triton.jit
def masked_scores(
    query,
    corner,
    reads,
    keys,
    key_stride,
    listed,
    list_size,
    biases,
    shift,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return the scores of the listed keys, int32 [BLOCK, GROUP], with -2^30 for hidden keys.

    corner is the place of each reader minus (15, 15). Places are row * 2^16 + column, so one
    subtraction gives both distances. If the lower distance is negative, it borrows from the upper
    distance and is then at least 2^15 itself. Start entries (stage 0) have the distant row 2^15 - 1
    and their number as the column.
    """
    at = tl.arange(0, GROUP)
    key, place, stage = (
        tl.load(listed + at),
        tl.load(listed + list_size + at),
        tl.load(listed + 2 * list_size + at),
    )
    component = tl.arange(0, BLOCK_DIM)
    vectors = tl.load(
        keys + key[None, :].to(tl.int64) * key_stride + component[:, None],
        mask=(component < HEAD_DIM)[:, None],
        other=0,
    )
    product = tl.dot(query, vectors, out_dtype=tl.int32)
    apart = (place[None, :] - corner[:, None]).to(tl.uint32)
    down, right = apart >> 16, apart & 65535
    start = (stage == 0)[None, :]
    seen = (start | ((down < 31) & (right < 31))) & (stage[None, :] <= reads[:, None])
    index = tl.where(start, 961 + (place & 3)[None, :], (down * 31 + right).to(tl.int32))
    bias = tl.load(biases + index, mask=seen, other=0).to(tl.int32)
    score = ((product + ((1 << shift) >> 1)) >> shift) + bias
    return tl.where(seen, score, -(1 << 30))


@triton.jit
def stage_attention_kernel(
    queries,
    keys,
    values,
    out,
    reader_places,
    readers,
    first_keys,
    listed_keys,
    biases,
    shifts,
    weights,
    reader_count,
    list_size,
    query_batch,
    query_stride,
    key_batch,
    key_stride,
    GAIN_BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute one block of readers, one head and one image, which are the three axes of the grid.

    queries is int8 [B, reader_count, heads * HEAD_DIM]. keys and values are int8 [B, K, heads *
    HEAD_DIM]. Their strides are given. out is int8 with the shape of queries, but contiguous.
    reader_places is int32 [2, reader_count] with the place and reads. readers is int32 [blocks,
    BLOCK], with -1 for none. listed_keys is int32 [3, list_size] with the index, place and
    key_stage; block i has the columns first_keys[i] .. first_keys[i + 1]. biases is int16 [heads,
    964], shifts int8 [heads] and weights int8 [128].
    """
    block, head = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    component = tl.arange(0, BLOCK_DIM)
    within = component < HEAD_DIM
    reader = tl.load(readers + block * BLOCK + tl.arange(0, BLOCK))
    there = reader >= 0
    corner = tl.load(reader_places + reader, mask=there, other=0) - (15 * 65536 + 15)
    reads = tl.load(reader_places + reader_count + reader, mask=there, other=-1)
    queries += image * query_batch + head * HEAD_DIM
    query = tl.load(
        queries + reader[:, None].to(tl.int64) * query_stride + component[None, :],
        mask=there[:, None] & within[None, :],
        other=0,
    )
    keys += image * key_batch + head * HEAD_DIM
    values += image * key_batch + head * HEAD_DIM
    biases += head * 964
    shift = tl.load(shifts + head).to(tl.int32)
    begin, end = tl.load(first_keys + block), tl.load(first_keys + block + 1)

    best = tl.full([BLOCK], -(1 << 30), tl.int32)
    for first in range(begin, end, GROUP):
        first = tl.multiple_of(first, GROUP)
        score = masked_scores(
            query, corner, reads, keys, key_stride, listed_keys + first, list_size, biases, shift,
            HEAD_DIM, BLOCK_DIM, GROUP,
        )  # fmt: skip
        best = tl.maximum(best, tl.max(score, axis=1))

    total = tl.zeros([BLOCK], tl.int32)
    weighted = tl.zeros([BLOCK, BLOCK_DIM], tl.int32)
    for first in range(begin, end, GROUP):
        first = tl.multiple_of(first, GROUP)
        score = masked_scores(
            query, corner, reads, keys, key_stride, listed_keys + first, list_size, biases, shift,
            HEAD_DIM, BLOCK_DIM, GROUP,
        )  # fmt: skip
        below = best[:, None] - score
        # Hidden keys have the score -2^30; a padding reader has no others.
        weight = tl.load(weights + below, mask=(score > -(1 << 29)) & (below < 128), other=0)
        key = tl.load(listed_keys + first + tl.arange(0, GROUP))
        vectors = tl.load(
            values + key[:, None].to(tl.int64) * key_stride + component[None, :],
            mask=within[None, :],
            other=0,
        )
        total += tl.sum(weight.to(tl.int32), axis=1)
        weighted = tl.dot(weight, vectors, weighted, out_dtype=tl.int32)

    total = tl.maximum(total, 1)
    offset = (total << (7 + GAIN_BITS)) + (total >> 1)
    numerator = (weighted << GAIN_BITS) + offset[:, None]  # 0 .. 2^31
    mean = (numerator // total[:, None]) - (1 << (7 + GAIN_BITS))
    mean = tl.minimum(tl.maximum(mean, -127), 127)
    inner = tl.num_programs(1) * HEAD_DIM
    place = (image * reader_count + reader[:, None]) * inner + head * HEAD_DIM + component[None, :]
    tl.store(out + place, mean.to(tl.int8), mask=there[:, None] & within[None, :])


def _check(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: tuple[torch.Tensor, ...],
    biases: torch.Tensor,
    shifts: torch.Tensor,
    gain_bits: int,
    weights: torch.Tensor,
) -> None:
    heads = len(shifts) if shifts.dim() == 1 else 0
    if shifts.dtype != torch.int8 or not heads:
        raise ValueError(f"shifts are {shifts.dtype} {tuple(shifts.shape)}; they must be int8 [H]")
    inner = queries.shape[-1] if queries.dim() == 3 else 0
    if queries.dtype != torch.int8 or inner % heads or not 1 <= inner // heads <= MAX_HEAD_DIM:
        raise ValueError(
            f"queries are {queries.dtype} {tuple(queries.shape)}; they must be int8 [B, E, H * D] "
            f"with H = {heads} and D up to {MAX_HEAD_DIM}"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        fits = tensor.dim() == 3 and tensor.shape[0] == len(queries) and tensor.shape[2] == inner
        if tensor.dtype != torch.int8 or not fits:
            raise ValueError(
                f"{name} are {tensor.dtype} {tuple(tensor.shape)}; they must be int8 "
                f"[{len(queries)}, K, {inner}]"
            )
    if keys.stride() != values.stride() or keys.stride(2) != 1:
        raise ValueError("keys and values must have equal strides, components side by side")
    if biases.dtype != torch.int16 or tuple(biases.shape) != (heads, TABLE_SIZE):
        raise ValueError(
            f"biases are {biases.dtype} {tuple(biases.shape)}; they must be int16 "
            f"[{heads}, {TABLE_SIZE}]"
        )
    if weights.dtype != torch.int8 or tuple(weights.shape) != (128,):
        raise ValueError(f"weights are {weights.dtype} {tuple(weights.shape)}, not int8 [128]")
    if not 0 <= gain_bits <= 5:
        raise ValueError(f"gain_bits is {gain_bits}; it must be 0 to 5")
    reader_places, readers, first_keys, listed_keys = plan
    shapes = {
        "reader_places": (reader_places, (2, queries.shape[1])),
        "readers": (readers, (readers.shape[0], BLOCK)),
        "first_keys": (first_keys, (readers.shape[0] + 1,)),
        "listed_keys": (listed_keys, (3, listed_keys.shape[-1] // GROUP * GROUP)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be int32 {shape}"
            )


def launch(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: tuple[torch.Tensor, ...],
    biases: torch.Tensor,
    shifts: torch.Tensor,
    gain_bits: int,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Check the arguments of percov2.triton_kernels.attention and run the kernel."""
    _check(queries, keys, values, plan, biases, shifts, gain_bits, weights)
    reader_places, readers, first_keys, listed_keys = plan
    require_runnable(
        queries=queries,
        keys=keys,
        values=values,
        biases=biases,
        shifts=shifts,
        weights=weights,
        reader_places=reader_places,
        readers=readers,
        first_keys=first_keys,
        listed_keys=listed_keys,
    )
    queries = queries.contiguous()
    tables = [tensor.contiguous() for tensor in (*plan, biases, shifts, weights)]
    out = torch.empty_like(queries)
    batch, count, inner = queries.shape
    heads = len(shifts)
    for first in range(0, batch if len(readers) else 0, IMAGES):
        images = slice(first, first + IMAGES)
        queue(
            stage_attention_kernel,
            (len(readers), heads, min(IMAGES, batch - first)),
            queries[images],
            keys[images],
            values[images],
            out[images],
            *tables,
            count,
            listed_keys.shape[1],
            queries.stride(0),
            queries.stride(1),
            keys.stride(0),
            keys.stride(1),
            GAIN_BITS=gain_bits,
            HEAD_DIM=inner // heads,
            BLOCK_DIM=max(padded(inner // heads), 32),
            BLOCK=BLOCK,
            GROUP=GROUP,
        )
    return out
