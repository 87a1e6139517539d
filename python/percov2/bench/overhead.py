"""Bytes above the ideal: short streams in bytes, long ones in percent; every stream is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.bench import own_coder
from percov2.bench.cases import (
    Case,
    Shape,
    ideal_bytes,
    integer_logits,
    interval_bytes,
    make_case,
)
from percov2.entropy import rans

CHECK_BYTES = 2
"""The 16-bit check that every stream of percov2 holds."""
LOGITS_AT_ONCE = 2**26


def short_streams(shape: Shape) -> dict[str, Any]:
    """Mean bytes per image above the ideal, with percov2's own precision.

    ``above_ideal`` counts from the float softmax of the logits, ``above_intervals`` from the
    coded intervals; both are beyond the check. The images are made and coded some at a time.
    """
    lengths, ideals, intervals = [], [], []
    for case in parts_of(shape):
        integers, bits = integer_logits(case.logits), case.prob_bits
        _, freqs = rans.intervals(integers, case.symbols, bits)
        buffer, offsets = own_coder.encode(case, integers, bits)
        decoder = rans.RansDecoder(buffer, offsets)
        own_coder.check_decoded(case, decoder, decoder.decode_logits(integers, bits))
        lengths.append(np.diff(offsets))
        ideals.append(ideal_bytes(case.logits, case.symbols))
        intervals.append(interval_bytes(freqs, bits))
    written = np.concatenate(lengths)
    record = _record(shape, own_coder.NAME, CHECK_BYTES, written, np.concatenate(ideals))
    above = written - np.concatenate(intervals) - CHECK_BYTES
    return {**record, "above_intervals": float(above.mean())}


def parts_of(shape: Shape) -> Iterator[Case]:
    """The images of a shape in cases that fit in memory."""
    at_once = max(1, LOGITS_AT_ONCE // (shape.tokens * shape.codebook))
    for part, first in enumerate(range(0, shape.images, at_once)):
        yield make_case(replace(shape, images=min(at_once, shape.images - first)), seed=part)


def peer_streams(case: Case, coder: str, lengths: list[int]) -> dict[str, Any]:
    """The same of another coder, from the bytes of its streams: one per image, or the first."""
    part = case.first(len(lengths))
    ideal = ideal_bytes(part.logits, part.symbols)
    return _record(part.shape, coder, 0, np.asarray(lengths), ideal)


def _record(
    shape: Shape, coder: str, check: int, lengths: NDArray[Any], ideal: NDArray[np.float64]
) -> dict[str, Any]:
    above = lengths - ideal - check
    return {
        "section": "overhead",
        "coder": coder,
        **asdict(shape),
        "ideal_bytes_per_image": float(ideal.mean()),
        "bytes_per_image": float(lengths.mean()),
        "check_bytes": check,
        "above_ideal": float(above.mean()),
        "above_ideal_error": _standard_error(above),
    }


def _standard_error(values: NDArray[np.float64]) -> float | None:
    """Of the mean; None for a single value, which tells nothing about others."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def long_stream(shape: Shape, parts: int, prob_bits: int) -> dict[str, Any]:
    """One stream of ``parts`` cases of a shape with one image: percent above the ideal.

    The parts are made again when they are needed, so that the logits of a long stream need not
    fit in memory.
    """

    def cases(order: Iterator[int] | range) -> Iterator[tuple[Case, Any]]:
        for part in order:
            case = make_case(replace(shape, images=1), seed=part)
            yield case, integer_logits(case.logits)

    check = [0xBEEF]
    encoder = rans.RansEncoder(check)
    ideal = by_intervals = 0.0
    for case, integers in cases(reversed(range(parts))):  # what is pushed last is decoded first
        starts, freqs = rans.intervals(integers, case.symbols, prob_bits)
        encoder.push(starts.reshape(-1), freqs.reshape(-1), case.counts, prob_bits)
        ideal += float(ideal_bytes(case.logits, case.symbols).sum())
        by_intervals += float(interval_bytes(freqs, prob_bits).sum())
    buffer, offsets = encoder.finish()
    decoder = rans.RansDecoder(buffer, offsets)
    for case, integers in cases(range(parts)):
        equal = np.array_equal(decoder.decode_logits(integers, prob_bits), case.symbols)
        own_coder.require(equal, "percov2 decoded other symbols")
    own_coder.require(decoder.finished(check).all(), "a long stream does not end in its check")
    return {
        "section": "long",
        "coder": own_coder.NAME,
        "codebook": shape.codebook,
        "symbols": shape.tokens * parts,
        "prob_bits": prob_bits,
        "bytes": len(buffer),
        "percent_above_ideal": 100 * (len(buffer) / ideal - 1),
        "percent_above_intervals": 100 * (len(buffer) / by_intervals - 1),
    }
