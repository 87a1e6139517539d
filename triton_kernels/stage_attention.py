"""Windowed, stage-masked integer attention (docs/reference/entropy-model.md, §3).

For each block of BLOCK readers, a plan lists the keys that any of them may see, in groups of GROUP.
All images of a batch share the plan, so one kernel first computes the biases of all pairs, which
also say what a reader must not see. The other kernel then computes one head of a block of one
image. Its first pass over the keys finds the largest score. Its second pass computes the weights,
their sum and the weighted values. There are no floats and no rescaling, so the order of the keys
does not matter.

A bias joins the product before the shift: floor((q.k + half) / 2^shift) + bias = floor((q.k + half
+ bias * 2^shift) / 2^shift). The tensor cores add it, and the largest score is found before the
shift, which keeps the order.

Ranges: |q.k| <= 64 * 127^2 < 2^20, shift <= 12 and |bias| < 2^11, so their sum is below 2^24. The
sum of the weights is at most 964 * 127 < 2^17. Weighted sums are at most 127 times as large, which
is below 2^24. The numerator of the mean is in 0 .. 2^31.
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
def stage_biases_kernel(
    out,
    reader_places,
    readers,
    first_keys,
    listed_keys,
    table,
    shifts,
    reader_count,
    list_size,
    size,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute the biases of one block of readers and one head, which are the axes of the grid.

    out is int32 [heads, size / GROUP, BLOCK, GROUP], for the ``size`` keys that the blocks list. An
    element is half + bias * 2^shift, or -2^30 for a hidden key. The other arguments are those of
    the plan (``attention``), table int16 [heads, 964] and shifts int8 [heads].

    Places are row * 2^16 + column, so one subtraction gives both distances. If the lower distance
    is negative, it borrows from the upper distance and is then at least 2^15 itself. Start entries
    (stage 0) have the distant row 2^15 - 1 and their number as the column.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    reader = tl.load(readers + block * BLOCK + tl.arange(0, BLOCK))
    there = reader >= 0
    corner = tl.load(reader_places + reader, mask=there, other=0) - (15 * 65536 + 15)
    reads = tl.load(reader_places + reader_count + reader, mask=there, other=-1)
    shift = tl.load(shifts + head).to(tl.int32)
    half = (1 << shift) >> 1
    at = tl.arange(0, GROUP)
    spot = tl.arange(0, BLOCK)[:, None] * GROUP + at[None, :]
    begin, end = tl.load(first_keys + block), tl.load(first_keys + block + 1)
    base = tl.load(first_keys)
    out += head.to(tl.int64) * size * BLOCK
    for first in range(begin, end, GROUP):
        first = tl.multiple_of(first, GROUP)
        tile = tl.multiple_of(first - base, GROUP) * BLOCK
        place = tl.load(listed_keys + list_size + first + at)
        stage = tl.load(listed_keys + 2 * list_size + first + at)
        apart = (place[None, :] - corner[:, None]).to(tl.uint32)
        down, right = apart >> 16, apart & 65535
        start = (stage == 0)[None, :]
        seen = (start | ((down < 31) & (right < 31))) & (stage[None, :] <= reads[:, None])
        index = tl.where(start, 961 + (place & 3)[None, :], (down * 31 + right).to(tl.int32))
        bias = tl.load(table + head * 964 + index, mask=seen, other=0).to(tl.int32)
        tl.store(out + tile + spot, tl.where(seen, (bias << shift) + half, -(1 << 30)))


@triton.jit
def stage_attention_kernel(
    queries,
    keys,
    values,
    out,
    readers,
    first_keys,
    listed_keys,
    biases,
    shifts,
    weights,
    reader_count,
    size,
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
    readers, first_keys and listed_keys are those of the plan (``attention``). biases are those of
    ``stage_biases_kernel``, shifts int8 [heads] and weights int8 [129], the last of which is 0.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    component = tl.arange(0, BLOCK_DIM)
    within = component < HEAD_DIM
    reader = tl.load(readers + block * BLOCK + tl.arange(0, BLOCK))
    there = reader >= 0
    queries += image * query_batch + head * HEAD_DIM
    query = tl.load(
        queries + reader[:, None].to(tl.int64) * query_stride + component[None, :],
        mask=there[:, None] & within[None, :],
        other=0,
    )
    keys += image * key_batch + head * HEAD_DIM
    values += image * key_batch + head * HEAD_DIM
    shift = tl.load(shifts + head).to(tl.int32)
    at = tl.arange(0, GROUP)
    spot = tl.arange(0, BLOCK)[:, None] * GROUP + at[None, :]
    begin, end = tl.load(first_keys + block), tl.load(first_keys + block + 1)
    base = tl.load(first_keys)
    biases += head.to(tl.int64) * size * BLOCK

    best = tl.full([BLOCK, GROUP], -(1 << 30), tl.int32)
    for first in range(begin, end, GROUP):
        first = tl.multiple_of(first, GROUP)
        key = tl.load(listed_keys + first + at).to(tl.int64)
        vectors = tl.load(
            keys + key[None, :] * key_stride + component[:, None], mask=within[:, None], other=0
        )
        bias = tl.load(biases + tl.multiple_of(first - base, GROUP) * BLOCK + spot)
        best = tl.maximum(best, tl.dot(query, vectors, bias, out_dtype=tl.int32))
    top = tl.max(best, axis=1) >> shift

    total = tl.zeros([BLOCK, GROUP], tl.int32)
    weighted = tl.zeros([BLOCK, BLOCK_DIM], tl.int32)
    for first in range(begin, end, GROUP):
        first = tl.multiple_of(first, GROUP)
        key = tl.load(listed_keys + first + at).to(tl.int64)
        vectors = tl.load(
            keys + key[None, :] * key_stride + component[:, None], mask=within[:, None], other=0
        )
        bias = tl.load(biases + tl.multiple_of(first - base, GROUP) * BLOCK + spot)
        score = tl.dot(query, vectors, bias, out_dtype=tl.int32) >> shift
        weight = tl.load(weights + tl.minimum(top[:, None] - score, 128))
        vectors = tl.load(
            values + key[:, None] * key_stride + component[None, :], mask=within[None, :], other=0
        )
        total += weight.to(tl.int32)
        weighted = tl.dot(weight, vectors, weighted, out_dtype=tl.int32)

    total = tl.maximum(tl.sum(total, axis=1), 1)
    offset = (total << (7 + GAIN_BITS)) + (total >> 1)
    numerator = (weighted << GAIN_BITS) + offset[:, None]  # 0 .. 2^31
    mean = (numerator // total[:, None]) - (1 << (7 + GAIN_BITS))
    mean = tl.minimum(tl.maximum(mean, -127), 127)
    inner = tl.num_programs(1) * HEAD_DIM
    place = (image * reader_count + reader[:, None]) * inner + head * HEAD_DIM + component[None, :]
    tl.store(out + place, mean.to(tl.int8), mask=there[:, None] & within[None, :])


Plan = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]


def _check_plan(plan: Plan, shifts: torch.Tensor) -> None:
    if shifts.dtype != torch.int8 or shifts.dim() != 1 or not len(shifts):
        raise ValueError(f"shifts are {shifts.dtype} {tuple(shifts.shape)}; they must be int8 [H]")
    reader_places, readers, first_keys, listed_keys, size = plan
    shapes = {
        "reader_places": (reader_places, (2, reader_places.shape[-1])),
        "readers": (readers, (readers.shape[0], BLOCK)),
        "first_keys": (first_keys, (readers.shape[0] + 1,)),
        "listed_keys": (listed_keys, (3, listed_keys.shape[-1] // GROUP * GROUP)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be int32 {shape}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
    if size % GROUP or not 0 <= size <= listed_keys.shape[1]:
        raise ValueError(
            f"size is {size}; it must be a multiple of {GROUP} up to {listed_keys.shape[1]}"
        )


def _check(
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
    _check_plan(plan, shifts)
    heads, inner = len(shifts), queries.shape[-1] if queries.dim() == 3 else 0
    if queries.dtype != torch.int8 or inner % heads or not 1 <= inner // heads <= MAX_HEAD_DIM:
        raise ValueError(
            f"queries are {queries.dtype} {tuple(queries.shape)}; they must be int8 [B, E, H * D] "
            f"with H = {heads} and D up to {MAX_HEAD_DIM}"
        )
    if queries.shape[1] != plan[0].shape[1]:
        raise ValueError(
            f"queries has {queries.shape[1]} readers; reader_places has {plan[0].shape[1]}"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        fits = tensor.dim() == 3 and tensor.shape[0] == len(queries) and tensor.shape[2] == inner
        if tensor.dtype != torch.int8 or not fits:
            raise ValueError(
                f"{name} are {tensor.dtype} {tuple(tensor.shape)}; they must be int8 "
                f"[{len(queries)}, K, {inner}]"
            )
    if keys.stride() != values.stride() or not keys.stride(2) == queries.stride(2) == 1:
        raise ValueError(
            "keys and values must have equal strides; components must lie side by side"
        )
    if out.dtype != torch.int8 or out.shape != queries.shape or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}; it must be int8 {tuple(queries.shape)}, "
            "contiguous"
        )
    shape = (heads, plan[4] // GROUP, BLOCK, GROUP)
    if biases.dtype != torch.int32 or tuple(biases.shape) != shape or not biases.is_contiguous():
        raise ValueError(
            f"biases are {biases.dtype} {tuple(biases.shape)}; they must be int32 {shape}"
        )
    if weights.dtype != torch.int8 or tuple(weights.shape) != (129,):
        raise ValueError(f"weights are {weights.dtype} {tuple(weights.shape)}, not int8 [129]")
    if not 0 <= gain_bits <= 5:
        raise ValueError(f"gain_bits is {gain_bits}; it must be 0 to 5")


def launch_biases(plan: Plan, table: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Check the arguments of percov2.triton_kernels.attention_biases and run the kernel."""
    _check_plan(plan, shifts)
    heads = len(shifts)
    if table.dtype != torch.int16 or tuple(table.shape) != (heads, TABLE_SIZE):
        raise ValueError(
            f"table is {table.dtype} {tuple(table.shape)}; it must be int16 [{heads}, {TABLE_SIZE}]"
        )
    reader_places, readers, first_keys, listed_keys, size = plan
    tensors = {
        "reader_places": reader_places,
        "readers": readers,
        "first_keys": first_keys,
        "listed_keys": listed_keys,
        "table": table.contiguous(),
        "shifts": shifts.contiguous(),
    }
    require_runnable(**tensors)
    out = torch.empty(heads, size // GROUP, BLOCK, GROUP, dtype=torch.int32, device=table.device)
    if size:
        queue(
            stage_biases_kernel,
            (len(readers), heads),
            out,
            *tensors.values(),
            reader_places.shape[1],
            listed_keys.shape[1],
            size,
            BLOCK=BLOCK,
            GROUP=GROUP,
        )
    return out


def launch(
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
    """Check the arguments of percov2.triton_kernels.attention and run the kernel."""
    _check(queries, keys, values, plan, biases, shifts, gain_bits, weights, out)
    reader_places, readers, first_keys, listed_keys, size = plan
    require_runnable(
        queries=queries,
        keys=keys,
        values=values,
        biases=biases,
        shifts=shifts,
        weights=weights,
        out=out,
        reader_places=reader_places,
        readers=readers,
        first_keys=first_keys,
        listed_keys=listed_keys,
    )
    tables = [readers, first_keys, listed_keys, biases, shifts.contiguous(), weights.contiguous()]
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
            size,
            queries.stride(0),
            queries.stride(1),
            keys.stride(0),
            keys.stride(1),
            GAIN_BITS=gain_bits,
            HEAD_DIM=inner // heads,
            BLOCK_DIM=max(padded(inner // heads), 32),
            BLOCK=BLOCK,
            GROUP=GROUP,
            num_warps=2,
        )
