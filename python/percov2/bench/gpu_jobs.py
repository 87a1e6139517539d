"""Jobs that measure single GPU kernels: work, expected result and bytes moved.

A job places its tensors on the device when it is made. docs/explanation/gpu-kernels.md describes
the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.bench import coders
from percov2.bench.cases import Shape, integer_logits, make_case
from percov2.bench.model import AttentionCase, pass_entries
from percov2.entropy import ranges, rans
from percov2.entropy.cdf import WEIGHT_TABLE
from percov2.entropy.int_transformer import random_tensors
from percov2.entropy.torch import cdf, intmath, rans_cuda
from percov2.entropy.torch.int_transformer import to_tensors
from percov2.entropy.torch.reader_plan import plan_readers
from percov2.entropy.transformer_config import TransformerConfig

__all__ = ["SCHEDULE", "Arrays", "Job", "Size", "coder_jobs", "host", "layer_jobs", "nearest_jobs"]

SCHEDULE = "qlds12"
LATENT = 32
"""Length of the quantizer's vectors (percov2.models.torch.quantizer)."""
_LOGITS_AT_ONCE, _ROWS_AT_ONCE = 2**26, 2**14
"""Limits per call of torch's operators, which make several wide tensors of that many elements."""
Arrays = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Size:
    """A batch of ``images`` images of ``side`` × ``side`` tokens, and the sizes of the model."""

    images: int
    side: int
    config: TransformerConfig

    @property
    def symbols(self) -> int:
        """Return the number of tokens in all images."""
        return self.images * self.side**2


def host(*tensors: Tensor) -> Arrays:
    """Return tensors as arrays."""
    return [tensor.cpu().numpy() for tensor in tensors]


@dataclass(frozen=True)
class Job:
    """Work for the GPU, with a reference on the CPU."""

    kernel: str
    case: str  # sizes
    bytes: float  # that must cross the memory bus, with every operand and result once
    work: Callable[[], Any]  # queues the kernels without waiting
    reference: Callable[[], Arrays]  # computes the result on the CPU
    result: Callable[[Any], Arrays] = host  # copies the result of ``work`` to the host
    engine: bool = False  # time ``reference`` too, because it is percov2's CPU engine
    before: Callable[[], object] | None = None  # restores the inputs that ``work`` changes
    unfused: Callable[[], Any] | None = None  # the same on the GPU with torch's operators


def coder_jobs(place: torch.device, size: Size, threads: int) -> Iterator[Job]:
    """Yield jobs for intervals, encoding and decoding.

    ``threads`` is the number of threads of the CPU engine.
    """
    from percov2.triton_kernels import symbol_intervals

    codebook, symbols = size.config.codebook_size, size.symbols
    case = make_case(Shape(codebook, size.side**2, size.images))
    bits, name, integers = case.prob_bits, f"V = {codebook}", integer_logits(case.logits)
    # An upper bound for a good model: every symbol costs log2(V) bits.
    stream_bytes = symbols * math.log2(codebook) / 8

    def engine_intervals() -> coders.Intervals:
        return rans.intervals(integers, case.symbols, bits, threads)

    intervals = engine_intervals()
    arrays = (integers, case.symbols, *intervals, case.checks.astype(np.int32))
    logits, chosen, start, freq, checks = (torch.from_numpy(a).to(place) for a in arrays)
    table = torch.tensor(WEIGHT_TABLE, dtype=torch.int32).to(place)
    yield Job(
        "symbol_intervals",
        name,
        symbols * (2 * codebook + 12),
        lambda: symbol_intervals(logits, chosen, bits, table),
        engine_intervals,
        lambda both: host(*both),
        engine=True,
        unfused=lambda: unfused_intervals(logits, chosen, bits),
    )

    def engine_streams() -> Arrays:
        encoder = coders.push(case, intervals, bits, threads)
        return (*encoder.finish(), encoder.symbols_before_output)

    yield Job(
        "encode_kernel + pack_kernel",
        name,
        8 * symbols + 3 * stream_bytes,
        lambda: rans_cuda.encode(start, freq, checks, bits),
        engine_streams,
        lambda streams: streams.to_host(),
        engine=True,
    )
    buffer, offsets, _ = engine_streams()
    streams = torch.from_numpy(buffer), torch.from_numpy(offsets)
    decoder = rans_cuda.CudaRansDecoder(*streams, place)
    states, positions = decoder.states.clone(), decoder.positions.clone()

    def engine_symbols() -> Arrays:
        plain = rans.RansDecoder(buffer, offsets)
        decoded = plain.decode(integers, bits, threads=threads)
        return decoded, plain.states.astype(np.int32), plain.positions

    # Unaligned rows use the other kernel.
    moved = torch.empty(logits.numel() + 1, dtype=torch.int16, device=place)
    unaligned = moved[1:].view(logits.shape).copy_(logits)
    for whole, rows in (("true", logits), ("false", unaligned)):
        yield Job(
            f"decode_kernel<{whole}>",
            name,
            symbols * (2 * codebook + 4) + stream_bytes,
            partial(decoder.decode, rows, bits),
            engine_symbols,
            lambda decoded: host(decoded, decoder.states, decoder.positions),
            engine=True,
            before=lambda: (decoder.states.copy_(states), decoder.positions.copy_(positions)),
        )


def unfused_intervals(logits: Tensor, symbols: Tensor, prob_bits: int) -> list[Tensor]:
    """Compute intervals without fusion: make whole tables and read two entries of each.

    The logits are int16 [B, n, V], and the symbols int32 [B, n]. Returns a list of tensors
    [b, n, 2], each for b images.
    """
    step = max(1, _LOGITS_AT_ONCE // max(1, logits[0].numel()))
    parts = []
    for part, chosen in zip(logits.split(step), symbols.split(step), strict=True):
        bounds, index = cdf.cdf(part, prob_bits), chosen.to(torch.int64).unsqueeze(-1)
        start, end = bounds.gather(-1, index), bounds.gather(-1, index + 1)
        parts.append(torch.cat([start, end - start], -1))
    return parts


def layer_jobs(place: torch.device, size: Size) -> Iterator[Job]:
    """Yield jobs for the kernels of a layer and the head.

    Linear maps are measured on queries, and the attention on all entries.
    """
    from percov2.triton_kernels import attention, attention_biases, attention_blocks, layer_norm

    config, dim, inner = size.config, size.config.dim, size.config.inner
    residual = _integers(2**17, (size.symbols, dim), torch.int32)
    gain = _integers(250, (dim,), torch.int16) + 650

    def plain_norm(rows: Tensor) -> Tensor:
        return intmath.layer_norm(rows, gain.to(torch.int32)).to(torch.int8)

    norm = partial(layer_norm, residual.to(place), gain.to(place))
    plain = partial(_in_parts, plain_norm, residual)
    yield Job("layer_norm", f"d = {dim}", 5 * dim * size.symbols, norm, plain)
    yield linear_job(place, size, "q", dim, inner, "int8")
    yield linear_job(place, size, "kv", dim, 2 * inner, "int8")
    yield linear_job(place, size, "out", inner, dim, "residual")
    yield linear_job(place, size, "up", dim, config.hidden, "table")
    yield linear_job(place, size, "down", config.hidden, dim, "residual")
    yield linear_job(place, size, "head", dim, config.codebook_size, "int16")
    case = AttentionCase(config, SCHEDULE, size.side, size.images)
    _, readers, keys = pass_entries(case.stages)
    (plan,) = plan_readers(readers, keys, place, *attention_blocks())
    weights = torch.tensor((*ranges.WEIGHT_TABLE, 0), dtype=torch.int8)
    made = (torch.from_numpy(case.q), torch.from_numpy(case.kv), case.bias, case.shift, weights)
    q, both, bias, shift, table = (t.to(place) for t in made)
    k, v = both.chunk(2, -1)
    biases, attended = attention_biases(plan, bias, shift), torch.empty_like(q)

    def attend() -> Tensor:
        attention(q, k, v, plan, biases, shift, case.gain_bits, table, attended)
        return attended

    yield Job(
        "attention",
        f"{config.heads} heads of {config.head_dim}, {SCHEDULE}",
        2 * size.images * inner * (len(readers) + len(keys)) + 4 * biases.numel(),
        attend,
        lambda: [case.compiled()],
        engine=True,
    )


def _integers(limit: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(-limit, limit + 1, shape, generator=generator, dtype=dtype)


def _in_parts(function: Callable[..., Tensor], *rows: Tensor) -> Arrays:
    """Apply a function to ``_ROWS_AT_ONCE`` rows at a time."""
    parts = zip(*(tensor.split(_ROWS_AT_ONCE) for tensor in rows), strict=True)
    return host(torch.cat([function(*part) for part in parts]))


_ENDS = {
    "int8": (-127, 127, 1),
    "table": (-127, 127, 1),
    "int16": (-(2**15), 2**15 - 1, 2),
    "residual": (-(2**20), 2**20, 8),
}
"""Limits and bytes per output for each end of a linear map. A residual is read and written."""


def linear_job(
    place: torch.device, size: Size, name: str, terms: int, outputs: int, end: str
) -> Job:
    """Return the job of one linear map of the model, with weights from ``random_tensors``."""
    from percov2.triton_kernels import linear

    prefix = name if name == "head" else f"layers.0.{name}"
    tensors, (low, high, moved) = to_tensors(random_tensors(size.config, 0)), _ENDS[end]
    kinds = ("weight", "bias", "multiplier", "shift")
    weight, bias, multiplier, shift = parameters = [tensors[f"{prefix}.{kind}"] for kind in kinds]
    x = _integers(127, (size.symbols, terms), torch.int8)
    width = outputs if end == "residual" else 1
    added = _integers(2**17, (size.symbols, width), torch.int32)
    extra = {"table": tensors["layers.0.gelu"], "residual": added}
    placed = [t.to(place) for t in (x, *parameters)]
    more = {kind: tensor.to(place) for kind, tensor in extra.items() if kind == end}
    dtype = torch.int16 if end == "int16" else None

    def plain(rows: Tensor, residual: Tensor) -> Tensor:
        acc = intmath.linear(rows.float(), weight.float(), bias.float())
        result = intmath.requantize(acc, multiplier.int(), shift.int(), low, high)
        if end == "table":
            return extra["table"][(result + 128).long()]
        if end == "residual":
            return intmath.residual_add(residual.clone(), result)
        return result.to(dtype or torch.int8)

    case = f"{name}, {terms} -> {outputs}, {end}"
    total = size.symbols * (terms + outputs * moved) + outputs * (terms + 9)
    work = partial(linear, *placed, **more, dtype=dtype)
    return Job("linear", case, total, work, partial(_in_parts, plain, x, added))


def nearest_jobs(place: torch.device, size: Size) -> Iterator[Job]:
    """Yield the job for the quantizer's search.

    Its inputs are small integers, whose similarities are exact and often equal.
    """
    from percov2.triton_kernels import nearest_codes

    codes = size.config.codebook_size
    vectors = _integers(2, (size.symbols, LATENT), torch.float32)
    codebook = _integers(2, (codes, LATENT), torch.float32).flip(0)
    placed = [x.to(place) for x in (vectors, codebook)]

    def plain(rows: Tensor) -> Tensor:
        similarity = rows @ codebook.T
        best = similarity == similarity.amax(1, keepdim=True)
        return best.to(torch.uint8).argmax(1).to(torch.int32)

    moved = size.symbols * (4 * LATENT + 4) + 4 * LATENT * codes
    case, work = f"{codes} codes of {LATENT}", partial(nearest_codes, *placed)
    yield Job("nearest_codes", case, moved, work, partial(_in_parts, plain, vectors))
