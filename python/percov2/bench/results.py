"""One measured coder on one case, as a JSON object."""

from __future__ import annotations

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
