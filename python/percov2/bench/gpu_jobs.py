"""The GPU kernels one by one: what runs, what must come out, and how many bytes must move.

A job holds its tensors; making it places them. docs/gpu-kernels.md says what the kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.bench import coders
from percov2.bench.cases import Shape, integer_logits, make_case
from percov2.bench.float_transformer import pass_entries
from percov2.bench.model import AttentionCase
from percov2.entropy import cdf, intmath, rans, rans_cuda
from percov2.entropy.int_transformer import random_tensors
from percov2.entropy.reader_plan import plan_readers
from percov2.entropy.transformer_config import TransformerConfig

SCHEDULE = "qlds12"
LATENT = 32
"""Length of the quantizer's vectors (percov2.models.quantizer)."""
_LOGITS_AT_ONCE, _ROWS_AT_ONCE = 2**26, 2**14
"""Torch's operators make several wide tensors of so many numbers or rows."""
Arrays = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Size:
    """``images`` of ``tokens`` each (a square grid), and a model for a codebook."""

    images: int
    tokens: int
    config: TransformerConfig

    @property
    def side(self) -> int:
        """Side of the grid. Raises ValueError unless the grid is a square."""
        side = math.isqrt(self.tokens)
        if side * side != self.tokens:
            raise ValueError(f"{self.tokens} tokens are no square grid")
        return side

    @property
    def symbols(self) -> int:
        """Tokens of all images."""
        return self.images * self.tokens


def host(*tensors: torch.Tensor) -> Arrays:
    """Return tensors as arrays."""
    return [tensor.cpu().numpy() for tensor in tensors]


@dataclass(frozen=True)
class Job:
    """Work of a device, and the same by others.

    Attributes:
        kernel, case: what runs, at which sizes.
        bytes: that must cross the memory's bus: every operand once, every result once.
        work: queues the kernels and waits for nothing.
        reference: computes the result on the CPU; result: brings that of ``work`` to the host.
        engine: whether ``reference`` is percov2's CPU engine, worth timing beside the device.
        before: puts back what ``work`` changes.
        unfused: the same on the device in torch's operators.
    """

    kernel: str
    case: str
    bytes: float
    work: Callable[[], Any]
    reference: Callable[[], Arrays]
    result: Callable[[Any], Arrays] = host
    engine: bool = False
    before: Callable[[], object] | None = None
    unfused: Callable[[], Any] | None = None


# The coder ---------------------------------------------------------------------------------------


class CoderJobs:
    """Intervals, streams and symbols at a size; the CPU engine takes ``threads``."""

    def __init__(self, place: torch.device, size: Size, threads: int) -> None:
        self.place, self.threads, self.symbols = place, threads, size.symbols
        self.codebook = size.config.codebook_size
        self.case = make_case(Shape(self.codebook, size.tokens, size.images))
        self.bits, self.name = self.case.prob_bits, f"V = {self.codebook}"
        self.logits = integer_logits(self.case.logits)
        self.pairs = rans.intervals(self.logits, self.case.symbols, self.bits, threads)
        # Where every symbol costs log2(V) bits, the most that a good model needs.
        self.stream_bytes = size.symbols * math.log2(self.codebook) / 8

    def jobs(self) -> Iterator[Job]:
        """Yield all jobs, each made when it is due."""
        yield self.intervals()
        yield self.encode()
        for whole in (True, False):
            yield self.decode(whole)

    def _placed(self, *arrays: NDArray[Any]) -> list[torch.Tensor]:
        return [torch.from_numpy(array).to(self.place) for array in arrays]

    def intervals(self) -> Job:
        """int16 logits -> (start, freq)."""
        from percov2.triton_kernels import symbol_intervals

        logits, symbols = self._placed(self.logits, self.case.symbols)
        table = torch.tensor(cdf.WEIGHT_TABLE, dtype=torch.int32).to(self.place)
        return Job(
            "symbol_intervals",
            self.name,
            self.symbols * (2 * self.codebook + 12),
            lambda: symbol_intervals(logits, symbols, self.bits, table),
            lambda: rans.intervals(self.logits, self.case.symbols, self.bits, self.threads),
            lambda both: host(*both),
            engine=True,
            unfused=lambda: unfused_intervals(logits, symbols, self.bits),
        )

    def encode(self) -> Job:
        """(start, freq) -> streams behind a head: two kernels."""
        start, freq, checks = self._placed(*self.pairs, self.case.checks.astype(np.int32))

        def reference() -> Arrays:
            encoder = coders.push(self.case, self.pairs, self.bits, self.threads)
            return (*encoder.finish(), encoder.symbols_before_output)

        return Job(
            "encode_kernel + pack_kernel",
            self.name,
            8 * self.symbols + 3 * self.stream_bytes,
            lambda: rans_cuda.encode(start, freq, checks, self.bits),
            reference,
            lambda streams: streams.to_host(),
            engine=True,
        )

    def decode(self, whole: bool) -> Job:
        """Logits and streams -> symbols; not ``whole``: the logits lie off their grid."""
        buffer, offsets = coders.push(self.case, self.pairs, self.bits, self.threads).finish()
        (logits,) = self._placed(self.logits)
        if not whole:
            moved = torch.empty(logits.numel() + 1, dtype=torch.int16, device=self.place)
            logits = moved[1:].view(logits.shape).copy_(logits)
        streams = torch.from_numpy(buffer), torch.from_numpy(offsets)
        decoder = rans_cuda.CudaRansDecoder(*streams, self.place)
        states, positions = decoder.states.clone(), decoder.positions.clone()

        def reference() -> Arrays:
            plain = rans.RansDecoder(buffer, offsets)
            symbols = plain.decode_logits(self.logits, self.bits, threads=self.threads)
            return symbols, plain.states.astype(np.int32), plain.positions

        return Job(
            f"decode_kernel<{str(whole).lower()}>",
            self.name,
            self.symbols * (2 * self.codebook + 4) + self.stream_bytes,
            lambda: decoder.decode_logits(logits, self.bits),
            reference,
            lambda symbols: host(symbols, decoder.states, decoder.positions),
            engine=True,
            before=lambda: (decoder.states.copy_(states), decoder.positions.copy_(positions)),
        )


def unfused_intervals(
    logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int
) -> list[torch.Tensor]:
    """Do what percov2.entropy.cdf does where nothing is fused: whole tables, of which two are read.

    logits int16 [B, n, V], symbols int32 [B, n]; a few images at a time. Returns [b, n, 2] each.
    """
    step = max(1, _LOGITS_AT_ONCE // max(1, logits[0].numel()))
    parts = []
    for part, chosen in zip(logits.split(step), symbols.split(step), strict=True):
        bounds, index = cdf.cdf(part, prob_bits), chosen.to(torch.int64).unsqueeze(-1)
        start, end = bounds.gather(-1, index), bounds.gather(-1, index + 1)
        parts.append(torch.cat([start, end - start], -1))
    return parts


# The model's layers and the quantizer ------------------------------------------------------------


def layer_jobs(place: torch.device, size: Size) -> Iterator[Job]:
    """Yield what a layer and the head launch: maps for queries, attention for all entries."""
    dim, inner, hidden = size.config.dim, size.config.inner, size.config.hidden
    yield norm_job(place, size)
    yield linear_job(place, size, "q", dim, inner, "int8")
    yield linear_job(place, size, "kv", dim, 2 * inner, "int8")
    yield linear_job(place, size, "out", inner, dim, "residual")
    yield linear_job(place, size, "up", dim, hidden, "table")
    yield linear_job(place, size, "down", hidden, dim, "residual")
    yield linear_job(place, size, "head", dim, size.config.codebook_size, "int16")
    yield attention_job(place, size)


def _integers(limit: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(-limit, limit + 1, shape, generator=generator, dtype=dtype)


def norm_job(place: torch.device, size: Size) -> Job:
    """Residual int32 -> int8."""
    from percov2.triton_kernels import layer_norm

    dim = size.config.dim
    residual = _integers(2**17, (size.symbols, dim), torch.int32)
    gain = 650 + _integers(250, (dim,), torch.int16)
    placed = [x.to(place) for x in (residual, gain)]

    def reference() -> Arrays:
        wide = gain.to(torch.int32)
        parts = [intmath.layer_norm(part, wide) for part in residual.split(_ROWS_AT_ONCE)]
        return host(torch.cat(parts).to(torch.int8))

    moved = 5 * dim * size.symbols
    return Job("layer_norm", f"d = {dim}", moved, lambda: layer_norm(*placed), reference)


def linear_job(
    place: torch.device, size: Size, name: str, terms: int, outputs: int, end: str
) -> Job:
    """One of the model's maps, with random weights as ``random_tensors`` draws them."""
    from percov2.triton_kernels import linear

    prefix = name if name == "head" else f"layers.0.{name}"
    tensors = random_tensors(size.config, 0)
    kinds = ("weight", "bias", "multiplier", "shift")
    parameters = [tensors[f"{prefix}.{kind}"] for kind in kinds]
    x = _integers(127, (size.symbols, terms), torch.int8)
    extra: dict[str, torch.Tensor] = {}
    if end == "table":
        extra["table"] = tensors["layers.0.gelu"]
    elif end == "residual":
        extra["residual"] = _integers(2**17, (size.symbols, outputs), torch.int32)
    placed = [t.to(place) for t in (x, *parameters)]
    placed_extra = {key: tensor.to(place) for key, tensor in extra.items()}
    dtype = torch.int16 if end == "int16" else None

    def reference() -> Arrays:
        begins = range(0, size.symbols, _ROWS_AT_ONCE)
        parts = [slice(begin, begin + _ROWS_AT_ONCE) for begin in begins]
        return host(torch.cat([plain_linear(x, parameters, end, extra, part) for part in parts]))

    written = {"int8": 1, "table": 1, "int16": 2, "residual": 8}[end]  # a residual is read, too
    return Job(
        "linear",
        f"{name}, {terms} -> {outputs}, {end}",
        size.symbols * (terms + outputs * written) + outputs * (terms + 9),
        lambda: linear(*placed, **placed_extra, dtype=dtype),
        reference,
    )


def plain_linear(
    x: torch.Tensor,
    parameters: list[torch.Tensor],
    end: str,
    extra: dict[str, torch.Tensor],
    part: slice,
) -> torch.Tensor:
    """Compute a linear map of docs/entropy-model.md and its end in torch, of some rows of x."""
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


def attention_job(place: torch.device, size: Size) -> Job:
    """All entries of one pass through one layer."""
    from percov2.triton_kernels import attention, attention_blocks

    config = size.config
    case = AttentionCase(config, SCHEDULE, size.side, size.images)
    _, readers, keys = pass_entries(case.stages)
    plan = plan_readers(readers, keys, place, *attention_blocks())
    weights = torch.tensor(intmath.WEIGHT_TABLE, dtype=torch.int8)
    made = (torch.from_numpy(case.q), torch.from_numpy(case.kv), case.bias, case.shift, weights)
    q, both, bias, shift, table = (t.to(place) for t in made)
    k, v = both[..., : config.inner], both[..., config.inner :]
    return Job(
        "attention",
        f"{config.heads} heads of {config.head_dim}, {SCHEDULE}",
        2 * size.images * config.inner * (len(readers) + len(keys)) + 12 * plan[3].shape[1],
        lambda: attention(q, k, v, plan, bias, shift, case.gain_bits, table),
        lambda: [case.compiled()],
        engine=True,
    )


def nearest_job(place: torch.device, size: Size) -> Job:
    """Vectors of small integers, whose similarities are exact: equal ones abound."""
    from percov2.triton_kernels import nearest_codes

    codes = size.config.codebook_size
    vectors = _integers(2, (size.symbols, LATENT), torch.float32)
    codebook = _integers(2, (codes, LATENT), torch.float32).flip(0)
    placed = [x.to(place) for x in (vectors, codebook)]

    def reference() -> Arrays:
        found = []
        for part in vectors.split(_ROWS_AT_ONCE):
            similarity = part @ codebook.T
            best = similarity == similarity.amax(1, keepdim=True)
            found.append(best.to(torch.uint8).argmax(1).to(torch.int32))
        return host(torch.cat(found))

    moved = size.symbols * (4 * LATENT + 4) + 4 * LATENT * codes
    case = f"{codes} codes of {LATENT}"
    return Job("nearest_codes", case, moved, lambda: nearest_codes(*placed), reference)
