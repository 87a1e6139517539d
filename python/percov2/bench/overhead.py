"""Bytes above the ideal: short streams in bytes, long ones in percent; every stream is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

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


def short_streams(case: Case) -> dict[str, Any]:
    """Mean bytes per image above the ideal, with percov2's own precision.

    ``above_ideal`` counts from the float softmax of the logits, ``above_intervals`` from the
    coded intervals; both are beyond the check.
    """
    integers, bits = integer_logits(case.logits), case.prob_bits
    _, freqs = rans.intervals(integers, case.symbols, bits)
    buffer, offsets = own_coder.encode(case, integers, bits)
    decoder = rans.RansDecoder(buffer, offsets)
    own_coder.check_decoded(case, decoder, decoder.decode_logits(integers, bits))
    lengths = np.diff(offsets)
    record = peer_streams(case, own_coder.NAME, "int16 logits", lengths)
    beyond = lengths - interval_bytes(freqs, bits) - CHECK_BYTES
    record["check_bytes"] = CHECK_BYTES
    record["above_ideal"] -= CHECK_BYTES
    return {**record, "prob_bits": bits, "above_intervals": float(beyond.mean())}


def peer_streams(case: Case, coder: str, given: str, lengths: Any) -> dict[str, Any]:
    """The same of another coder, from the bytes of its streams: one per image, or the first."""
    part = case.first(len(lengths))
    ideal = ideal_bytes(part.logits, part.symbols)
    above = np.asarray(lengths) - ideal
    return {
        "section": "overhead",
        "coder": coder,
        "given": given,
        **asdict(part.shape),
        "ideal_bytes_per_image": float(ideal.mean()),
        "bytes_per_image": float(np.mean(lengths)),
        "check_bytes": 0,
        "above_ideal": float(above.mean()),
        "above_ideal_deviation": float(above.std()),
    }


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
