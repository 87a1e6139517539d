"""The coder's kernels on a device: what runs, and what must come out of it.

A job holds its tensors; making it places them. ``work`` queues the kernels and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.bench import gpu_kernels
from percov2.bench.cases import Case, Shape, integer_logits, make_case
from percov2.bench.gpu_device import Gpu
from percov2.bench.gpu_kernels import Row, Size
from percov2.entropy import cdf, rans, rans_cuda

Arrays = Sequence[NDArray[Any]]
_LOGITS_AT_ONCE = 2**26
"""The unfused form makes several int64 tensors of this many numbers."""


@dataclass(frozen=True)
class Job:
    """Work of a device, and the same by others.

    Attributes:
        rows: the kernels that run, one after the other, at one case.
        work: queues the kernels; result: brings what it returned to the host.
        reference: computes the result on the CPU.
        engine: whether ``reference`` is percov2's CPU engine, worth timing beside the device.
        before: puts back what ``work`` changes.
        unfused: the same on the device in torch's operators.
    """

    rows: tuple[Row, ...]
    work: Callable[[], Any]
    result: Callable[[Any], Arrays]
    reference: Callable[[], Arrays]
    engine: bool = False
    before: Callable[[], object] | None = None
    unfused: Callable[[], Any] | None = None


def host(*tensors: torch.Tensor) -> Arrays:
    """Tensors as arrays."""
    return [tensor.cpu().numpy() for tensor in tensors]


def coder_jobs(gpu: Gpu, size: Size, threads: int) -> Iterator[Job]:
    """Intervals, streams and symbols at a size; the CPU engine takes ``threads``."""
    case = make_case(Shape(size.config.codebook_size, size.tokens, size.images))
    logits = integer_logits(case.logits)
    starts, freqs = rans.intervals(logits, case.symbols, case.prob_bits, threads)
    yield interval_job(gpu, size, case, logits, threads)
    yield encode_job(gpu, size, case, starts, freqs, threads)
    for whole in (True, False):
        yield decode_job(gpu, size, case, logits, (starts, freqs), whole, threads)


def interval_job(gpu: Gpu, size: Size, case: Case, logits: NDArray[Any], threads: int) -> Job:
    """int16 logits -> (start, freq)."""
    from percov2.triton_kernels import symbol_intervals

    bits = case.prob_bits
    placed, symbols = (torch.from_numpy(a).to(gpu.place) for a in (logits, case.symbols))
    table = torch.tensor(cdf.WEIGHT_TABLE, dtype=torch.int32).to(gpu.place)
    return Job(
        (gpu_kernels.coder_rows(size)["symbol_intervals"],),
        work=lambda: symbol_intervals(placed, symbols, bits, table),
        result=lambda both: host(*both),
        reference=lambda: rans.intervals(logits, case.symbols, bits, threads),
        engine=True,
        unfused=lambda: unfused_intervals(placed, symbols, bits),
    )


def unfused_intervals(
    logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int
) -> list[torch.Tensor]:
    """What percov2.entropy.cdf does where nothing is fused: whole tables, of which two are read.

    logits int16 [B, n, V], symbols int32 [B, n]; a few images at a time. Returns [2, b, n] each.
    """
    step = max(1, _LOGITS_AT_ONCE // max(1, logits[0].numel()))
    parts = []
    for begin in range(0, len(logits), step):
        bounds = cdf.cdf(logits[begin : begin + step], prob_bits)
        index = symbols[begin : begin + step].to(torch.int64).unsqueeze(-1)
        start, end = bounds.gather(-1, index), bounds.gather(-1, index + 1)
        parts.append(torch.cat([start, end - start], -1))
    return parts


def encode_job(
    gpu: Gpu,
    size: Size,
    case: Case,
    starts: NDArray[np.int32],
    freqs: NDArray[np.int32],
    threads: int,
) -> Job:
    """(start, freq) -> streams behind a head: two kernels."""
    checks = torch.from_numpy(case.checks.astype(np.int32)).to(gpu.place)
    start, freq = (torch.from_numpy(a).to(gpu.place) for a in (starts, freqs))

    def reference() -> Arrays:
        encoder = rans.RansEncoder(case.checks)
        encoder.push(starts.ravel(), freqs.ravel(), case.counts, case.prob_bits, threads)
        return (*encoder.finish(), encoder.symbols_before_output)

    rows = gpu_kernels.coder_rows(size)
    return Job(
        (rows["encode_kernel"], rows["pack_kernel"]),
        work=lambda: rans_cuda.encode(start, freq, checks, case.prob_bits),
        result=lambda streams: streams.to_host(),
        reference=reference,
        engine=True,
    )


def decode_job(
    gpu: Gpu,
    size: Size,
    case: Case,
    logits: NDArray[np.int16],
    intervals: tuple[NDArray[np.int32], NDArray[np.int32]],
    whole: bool,
    threads: int,
) -> Job:
    """Logits and streams -> symbols, all at once; not ``whole``: the logits lie off their grid."""
    bits = case.prob_bits
    encoder = rans.RansEncoder(case.checks)
    starts, freqs = intervals
    encoder.push(starts.ravel(), freqs.ravel(), case.counts, bits, threads)
    buffer, offsets = encoder.finish()
    placed = torch.from_numpy(logits).to(gpu.place)
    if not whole:
        moved = torch.empty(placed.numel() + 1, dtype=torch.int16, device=gpu.place)
        placed = moved[1:].view(placed.shape).copy_(placed)
    decoder = rans_cuda.CudaRansDecoder(
        torch.from_numpy(buffer), torch.from_numpy(offsets), gpu.place
    )
    states, positions = decoder.states.clone(), decoder.positions.clone()

    def before() -> None:
        decoder.states.copy_(states)
        decoder.positions.copy_(positions)

    def result(symbols: torch.Tensor) -> Arrays:
        return host(symbols, decoder.states, decoder.positions)

    def reference() -> Arrays:
        plain = rans.RansDecoder(buffer, offsets)
        symbols = plain.decode_logits(logits, bits, threads=threads)
        return symbols, plain.states.astype(np.int32), plain.positions

    return Job(
        (gpu_kernels.coder_rows(size)[f"decode_kernel<{str(whole).lower()}>"],),
        work=lambda: decoder.decode_logits(placed, bits),
        result=result,
        reference=reference,
        engine=True,
        before=before,
    )
