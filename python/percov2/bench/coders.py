"""Checks, times and sizes of percov2's coder on synthetic cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.bench import cases
from percov2.bench.cases import Case, Shape, integer_logits, make_case
from percov2.bench.timing import Effort, Record, measure
from percov2.entropy import rans
from percov2.entropy.torch import cdf

__all__ = ["GIVEN", "INTERVALS", "LOGITS", "LOGITS_AT_ONCE", "NAME", "Intervals", "Mismatch"]
__all__ += ["Streams", "encode", "long_stream", "parts_of", "peer_streams", "push", "require"]
__all__ += ["short_streams", "timed"]

NAME = "percov2"
INTERVALS = "intervals / CDF rows"
LOGITS = ("float32 logits", "bfloat16 logits", "int16 logits")
GIVEN = {INTERVALS: "coder", **dict.fromkeys(LOGITS, "logits")}
"""Section of the report for each kind of input."""
CHECK_BYTES = 2
"""Size of the check in every stream of percov2."""
LOGITS_AT_ONCE = 2**26
"""Largest number of logits in one case. Larger cases are made in parts."""
_ORACLE_LOGITS = 2**20
"""Number of logits of a case that are compared with the torch oracle."""
Intervals = tuple[NDArray[np.int32], NDArray[np.int32]]
Streams = tuple[NDArray[np.uint8], NDArray[np.int64]]


class Mismatch(RuntimeError):
    """The error for a coder that returns wrong symbols or intervals."""


def require(holds: bool | np.bool_, what: str) -> None:
    """Raise Mismatch with the message ``what`` unless ``holds`` is True."""
    if not holds:
        raise Mismatch(f"{what}; the measurement stops here")


def push(case: Case, intervals: Intervals, prob_bits: int, threads: int = 1) -> rans.RansEncoder:
    """Return an encoder that holds the intervals, int32 [B, n], of a case."""
    encoder = rans.RansEncoder(case.checks)
    starts, freqs = intervals
    encoder.encode(starts.ravel(), freqs.ravel(), case.counts, prob_bits, threads)
    return encoder


def encode(case: Case, logits: Any, prob_bits: int) -> Streams:
    """Encode a case with logits [B, n, V]. Return the buffer and the offsets."""
    return push(case, rans.intervals(logits, case.symbols, prob_bits), prob_bits).finish()


def _check_decoded(case: Case, decoder: rans.RansDecoder, symbols: NDArray[np.int32]) -> None:
    require(np.array_equal(symbols, case.symbols), "percov2 decoded other symbols")
    require(decoder.finished(case.checks).all(), "a stream of percov2 does not end in its check")


def _checked_intervals(case: Case, logits: Any) -> Intervals:
    """Return the intervals of a case, after comparing a sample of them with torch's intervals."""
    found = rans.intervals(logits, case.symbols, case.prob_bits)
    size, rows = case.shape.codebook, max(1, _ORACLE_LOGITS // case.shape.codebook)
    sample = torch.from_numpy(integer_logits(case.logits.reshape(1, -1, size)[:, :rows])[0])
    symbols = torch.from_numpy(case.symbols.reshape(-1)[:rows])
    for mine, oracle in zip(found, cdf.intervals(sample, symbols, case.prob_bits), strict=True):
        equal = np.array_equal(mine.reshape(-1)[:rows], oracle.numpy())
        require(equal, "intervals differ from those of percov2.entropy.torch.cdf")
    return found


def timed(case: Case, given: str, effort: Effort) -> Record:
    """Measure encoding to bytes and decoding to symbols, for one kind of input from ``GIVEN``.

    The ideal cost takes into account the rounding of logits to bfloat16, which the caller chooses.
    It does not include the rounding to int16, which percov2 does itself.
    """
    bits, symbols = case.prob_bits, case.shape.symbols
    logits: Any = case.logits if given == "float32 logits" else integer_logits(case.logits)
    if given == "bfloat16 logits":
        logits = torch.from_numpy(case.logits).to(torch.bfloat16)
        case = replace(case, logits=logits.to(torch.float32).numpy())
    intervals = _checked_intervals(case, logits)
    if given == INTERVALS:
        ideal, tables = cases.interval_bytes(intervals[1], bits), rans.cdf(logits, bits)
    else:
        ideal = cases.ideal_bytes(case.logits, case.symbols)

    def encoded() -> Streams:
        known = given == INTERVALS
        return push(case, intervals, bits).finish() if known else encode(case, logits, bits)

    def decoded(decoder: rans.RansDecoder) -> NDArray[np.int32]:
        known = given == INTERVALS
        return (
            decoder.decode_cdf(tables, bits, trusted=True)
            if known
            else decoder.decode(logits, bits)
        )

    streams = encoded()
    decoder = rans.RansDecoder(*streams)
    _check_decoded(case, decoder, decoded(decoder))
    names = {"section": GIVEN[given], "coder": NAME, "given": given}
    return {**names, **asdict(case.shape)} | {
        "encode": measure(encoded, effort).rate(symbols),
        "decode": measure(lambda: decoded(rans.RansDecoder(*streams)), effort).rate(symbols),
        "bytes": len(streams[0]),
        "ideal_bytes": float(ideal.sum()),
    }


def short_streams(shape: Shape) -> Record:
    """Return the mean number of bytes per image above the ideal cost, without the check.

    For ``above_ideal``, the ideal is the cost under the float softmax of the logits. For
    ``above_intervals``, it is the cost of the coded intervals.
    """
    rows = []
    for case in parts_of(shape):
        integers, bits = integer_logits(case.logits), case.prob_bits
        found = rans.intervals(integers, case.symbols, bits)
        buffer, offsets = push(case, found, bits).finish()
        decoder = rans.RansDecoder(buffer, offsets)
        _check_decoded(case, decoder, decoder.decode(integers, bits))
        ideal = cases.ideal_bytes(case.logits, case.symbols)
        rows.append((np.diff(offsets), ideal, cases.interval_bytes(found[1], bits)))
    lengths, ideals, intervals = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    record = _overhead(shape, NAME, CHECK_BYTES, lengths, ideals)
    return {**record, "above_intervals": float((lengths - intervals - CHECK_BYTES).mean())}


def parts_of(shape: Shape) -> Iterator[Case]:
    """Yield the images of a shape as cases that fit in memory."""
    at_once = max(1, LOGITS_AT_ONCE // (shape.tokens * shape.codebook))
    for part, first in enumerate(range(0, shape.images, at_once)):
        yield make_case(replace(shape, images=min(at_once, shape.images - first)), seed=part)


def peer_streams(case: Case, coder: str, lengths: list[int]) -> Record:
    """Return the bytes above the ideal of another coder.

    ``lengths`` are the coder's numbers of bytes for the first images.
    """
    part = case.first(len(lengths))
    ideal = cases.ideal_bytes(part.logits, part.symbols)
    return _overhead(part.shape, coder, 0, np.asarray(lengths), ideal)


def _overhead(
    shape: Shape, coder: str, check: int, lengths: NDArray[Any], ideal: NDArray[np.float64]
) -> Record:
    above = lengths - ideal - check
    # The standard error of the mean is undefined for a single value.
    error = float(above.std(ddof=1) / np.sqrt(len(above))) if len(above) > 1 else None
    return {"section": "overhead", "coder": coder, **asdict(shape)} | {
        "ideal_bytes_per_image": float(ideal.mean()),
        "bytes_per_image": float(lengths.mean()),
        "check_bytes": check,
        "above_ideal": float(above.mean()),
        "above_ideal_error": error,
    }


def long_stream(shape: Shape, parts: int, prob_bits: int) -> Record:
    """Code ``parts`` cases of one image as one stream. Return its excess over the ideal in percent.

    Decoding makes each case again, so that only one case needs to fit in memory.
    """
    check, ideal, by_intervals = [0xBEEF], 0.0, 0.0
    encoder = rans.RansEncoder(check)
    for part in reversed(range(parts)):  # decoding starts with the part pushed last
        case = make_case(replace(shape, images=1), seed=part)
        starts, freqs = rans.intervals(integer_logits(case.logits), case.symbols, prob_bits)
        encoder.encode(starts.ravel(), freqs.ravel(), case.counts, prob_bits)
        ideal += float(cases.ideal_bytes(case.logits, case.symbols).sum())
        by_intervals += float(cases.interval_bytes(freqs, prob_bits).sum())
    buffer, offsets = encoder.finish()
    decoder = rans.RansDecoder(buffer, offsets)
    for part in range(parts):
        case = make_case(replace(shape, images=1), seed=part)
        symbols = decoder.decode(integer_logits(case.logits), prob_bits)
        require(np.array_equal(symbols, case.symbols), "percov2 decoded other symbols")
    require(decoder.finished(check).all(), "a long stream does not end in its check")
    sizes = {"codebook": shape.codebook, "symbols": shape.tokens * parts, "prob_bits": prob_bits}
    return {"section": "long", "coder": NAME, **sizes, "bytes": len(buffer)} | {
        "percent_above_ideal": 100 * (len(buffer) / ideal - 1),
        "percent_above_intervals": 100 * (len(buffer) / by_intervals - 1),
    }
