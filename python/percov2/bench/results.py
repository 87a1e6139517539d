"""One measured coder on one case, as a JSON object."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.bench.cases import Shape
from percov2.bench.timing import Timing


def rate(timing: Timing, symbols: int) -> dict[str, Any]:
    """A timing with its throughput: million symbols per second at the median."""
    return {**asdict(timing), "msym_per_s": symbols / timing.median_s / 1e6}


def result(
    section: str,
    coder: str,
    given: str,
    shape: Shape,
    encode: Timing,
    decode: Timing,
    stream_bytes: NDArray[np.int64],
    ideal: NDArray[np.float64],
) -> dict[str, Any]:
    """A record of the report.

    Args:
        section: "coder" or "logits".
        coder: who.
        given: what the coder was given.
        stream_bytes, ideal: per image [B], what came out and the least it could be.
    """
    return {
        "section": section,
        "coder": coder,
        "given": given,
        **asdict(shape),
        "encode": rate(encode, shape.symbols),
        "decode": rate(decode, shape.symbols),
        "bytes": int(stream_bytes.sum()),
        "ideal_bytes": float(ideal.sum()),
    }


def middle(rounds: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One round out of several of the same records: of every timing the one with the middle median.

    Raises ValueError if the rounds do not hold the same records.
    """
    merged = []
    for same in zip(*rounds, strict=True):
        record = dict(same[0])
        if any(
            (r["coder"], r["given"], r["bytes"])
            != (record["coder"], record["given"], record["bytes"])
            for r in same
        ):
            raise ValueError("the rounds of a measurement do not hold the same records")
        for way in ("encode", "decode"):
            wanted = statistics.median_low([r[way]["median_s"] for r in same])
            record[way] = next(r[way] for r in same if r[way]["median_s"] == wanted)
        merged.append(record)
    return merged
