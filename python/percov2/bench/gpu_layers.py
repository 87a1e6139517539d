"""The Triton kernels of the model's layers, and of the quantizer, on a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from percov2.bench import gpu_kernels
from percov2.bench.attention import AttentionCase
from percov2.bench.gpu_device import Gpu
from percov2.bench.gpu_jobs import Arrays, Job, host
from percov2.bench.gpu_kernels import LATENT, SCHEDULE, Row, Size
from percov2.entropy import intmath
from percov2.entropy.int_transformer import random_tensors
from percov2.entropy.reader_plan import plan_readers

_ROWS_AT_ONCE = 2**14
"""The oracles in torch make several wide tensors of this many rows."""


def layer_jobs(gpu: Gpu, size: Size) -> Iterator[Job]:
    """A job for each of ``gpu_kernels.layer_rows``."""
    norm, *maps, attended = gpu_kernels.layer_rows(size)
    yield norm_job(gpu, size, norm)
    for row, (name, _, outputs, end) in zip(
        maps, gpu_kernels.linear_maps(size.config), strict=True
    ):
        yield linear_job(gpu, size, row, name, outputs, end)
    yield attention_job(gpu, size, attended)


def _integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(low, high + 1, shape, generator=generator, dtype=dtype)


def norm_job(gpu: Gpu, size: Size, row: Row) -> Job:
    """Residual int32 -> int8."""
    from percov2.triton_kernels import layer_norm

    dim, limit = size.config.dim, 2**17
    residual = _integers(-limit, limit, (size.symbols, dim), torch.int32)
    gain = _integers(400, 900, (dim,), torch.int16)
    placed = [x.to(gpu.place) for x in (residual, gain)]

    def reference() -> Arrays:
        wide = gain.to(torch.int32)
        parts = [intmath.layer_norm(part, wide) for part in residual.split(_ROWS_AT_ONCE)]
        return host(torch.cat(parts).to(torch.int8))

    return Job(
        (row,),
        work=lambda: layer_norm(*placed),
        result=host,
        reference=reference,
    )


def linear_job(gpu: Gpu, size: Size, row: Row, name: str, outputs: int, end: str) -> Job:
    """One of the model's maps, with random weights as ``random_tensors`` draws them."""
    from percov2.triton_kernels import linear

    prefix = name if name == "head" else f"layers.0.{name}"
    tensors = random_tensors(size.config, 0)
    kinds = ("weight", "bias", "multiplier", "shift")
    parameters = [tensors[f"{prefix}.{kind}"] for kind in kinds]
    x = _integers(-127, 127, (size.symbols, parameters[0].shape[1]), torch.int8)
    extra: dict[str, Any] = {}
    if end == "table":
        extra["table"] = tensors["layers.0.gelu"]
    elif end == "residual":
        extra["residual"] = _integers(-(2**17), 2**17, (size.symbols, outputs), torch.int32)
    placed = [t.to(gpu.place) for t in (x, *parameters)]
    placed_extra = {key: tensor.to(gpu.place) for key, tensor in extra.items()}
    dtype = torch.int16 if end == "int16" else None

    def reference() -> Arrays:
        begins = range(0, size.symbols, _ROWS_AT_ONCE)
        parts = [slice(begin, begin + _ROWS_AT_ONCE) for begin in begins]
        return host(torch.cat([plain_linear(x, parameters, end, extra, part) for part in parts]))

    return Job(
        (row,),
        work=lambda: linear(*placed, **placed_extra, dtype=dtype),
        result=host,
        reference=reference,
    )


def plain_linear(
    x: torch.Tensor,
    parameters: list[torch.Tensor],
    end: str,
    extra: dict[str, torch.Tensor],
    part: slice,
) -> torch.Tensor:
    """A linear map of docs/entropy-model.md and its end, in torch, of some rows of x."""
    weight, bias = (t.to(torch.float32) for t in parameters[:2])
    multiplier, shift = (t.to(torch.int32) for t in parameters[2:])
    limits = {"int16": (-(2**15), 2**15 - 1), "residual": (-(2**20), 2**20)}
    low, high = limits.get(end, (-127, 127))
    acc = intmath.linear(x[part].to(torch.float32), weight, bias)
    result = intmath.requantize(acc, multiplier, shift, low, high)
    if end == "table":
        return extra["table"][(result + 128).to(torch.int64)]
    if end == "residual":
        return intmath.residual_add(extra["residual"][part].clone(), result)
    return result.to(torch.int16 if end == "int16" else torch.int8)


def attention_job(gpu: Gpu, size: Size, row: Row) -> Job:
    """All entries of one pass through one layer."""
    from percov2.triton_kernels import attention, attention_blocks

    config = size.config
    case = AttentionCase(config, SCHEDULE, size.side, size.images)
    reading, keys = gpu_kernels.pass_entries(size.side)
    plan = plan_readers(reading, keys, gpu.place, *attention_blocks())
    weights = torch.tensor(intmath.WEIGHT_TABLE, dtype=torch.int8)
    q, both, bias, shift, table = (
        t.to(gpu.place)
        for t in (
            torch.from_numpy(case.q),
            torch.from_numpy(case.kv),
            case.bias,
            case.shift,
            weights,
        )
    )
    k, v = both[..., : config.inner], both[..., config.inner :]
    return Job(
        (row,),
        work=lambda: attention(q, k, v, plan, bias, shift, case.gain_bits, table),
        result=host,
        reference=lambda: [case.compiled()],
        engine=True,
    )


def nearest_job(gpu: Gpu, size: Size) -> Job:
    """Vectors of small integers, whose similarities are exact: equal ones abound."""
    from percov2.triton_kernels import nearest_codes

    codes = size.config.codebook_size
    vectors = _integers(-2, 2, (size.symbols, LATENT), torch.float32)
    codebook = _integers(-2, 2, (codes, LATENT), torch.float32).flip(0)
    placed = [x.to(gpu.place) for x in (vectors, codebook)]

    def reference() -> Arrays:
        found = []
        for part in vectors.split(_ROWS_AT_ONCE):
            similarity = part @ codebook.T
            best = similarity == similarity.amax(1, keepdim=True)
            found.append(best.to(torch.uint8).argmax(1).to(torch.int32))
        return host(torch.cat(found))

    return Job(
        (gpu_kernels.nearest_row(size),),
        work=lambda: nearest_codes(*placed),
        result=host,
        reference=reference,
    )
