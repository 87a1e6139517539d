"""percov2's coder on a case: checked against the oracle and by decoding, then timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.bench.cases import Case, ideal_bytes, integer_logits, interval_bytes
from percov2.bench.results import result
from percov2.bench.timing import Effort, measure
from percov2.entropy import cdf, rans

NAME = "percov2"
_ORACLE_LOGITS = 2**20
"""So many logits of a case are also given to the oracle in torch."""
KINDS = ("float32", "bfloat16", "int16")
"""Types of logits that are measured."""
Streams = tuple[NDArray[np.uint8], NDArray[np.int64]]


class Mismatch(RuntimeError):
    """A coder gave other symbols or intervals than it must; nothing is timed then."""


def require(holds: bool | np.bool_, what: str) -> None:
    """Raise Mismatch unless ``holds``."""
    if not holds:
        raise Mismatch(f"{what}; the figures would mean nothing")


def push(
    case: Case, starts: NDArray[np.int32], freqs: NDArray[np.int32], prob_bits: int
) -> Streams:
    """The streams of a case from intervals int32 [B, n]: buffer and offsets."""
    encoder = rans.RansEncoder(case.checks)
    encoder.push(starts.reshape(-1), freqs.reshape(-1), case.counts, prob_bits)
    return encoder.finish()


def encode(case: Case, logits: NDArray[Any], prob_bits: int) -> Streams:
    """The streams of a case from logits [B, n, V]."""
    return push(case, *rans.intervals(logits, case.symbols, prob_bits), prob_bits)


def check_decoded(case: Case, decoder: rans.RansDecoder, symbols: NDArray[np.int32]) -> None:
    """Raise Mismatch unless all symbols came back and every stream ended in its check."""
    require(np.array_equal(symbols, case.symbols), "percov2 decoded other symbols")
    require(decoder.finished(case.checks).all(), "a stream of percov2 does not end in its check")


def _check_intervals(case: Case, integers: NDArray[np.int16], given: tuple[Any, Any]) -> None:
    rows = max(1, _ORACLE_LOGITS // case.shape.codebook)
    sample = torch.from_numpy(integers.reshape(-1, case.shape.codebook)[:rows])
    chosen = torch.from_numpy(case.symbols.reshape(-1)[:rows])
    for mine, oracle in zip(given, cdf.intervals(sample, chosen, case.prob_bits), strict=True):
        equal = np.array_equal(mine.reshape(-1)[:rows], oracle.numpy())
        require(equal, "intervals differ from those of percov2.entropy.cdf")


def coder_only(case: Case, effort: Effort) -> dict[str, Any]:
    """Intervals given -> bytes; bytes and CDF rows given -> symbols."""
    integers, bits = integer_logits(case.logits), case.prob_bits
    starts, freqs = rans.intervals(integers, case.symbols, bits)
    _check_intervals(case, integers, (starts, freqs))
    tables = rans.cdf(integers, bits)
    streams = push(case, starts, freqs, bits)
    decoder = rans.RansDecoder(*streams)
    check_decoded(case, decoder, decoder.decode_cdf(tables, bits))
    return result(
        "coder",
        NAME,
        "intervals / CDF rows",
        case.shape,
        encode=measure(lambda: push(case, starts, freqs, bits), effort),
        decode=measure(lambda: rans.RansDecoder(*streams).decode_cdf(tables, bits), effort),
        stream_bytes=np.diff(streams[1]),
        ideal=interval_bytes(freqs, bits),
    )


def given_logits(case: Case, kind: str) -> tuple[Any, Case]:
    """Logits of a type ("float32", "bfloat16" or "int16"), and the case as they tell it.

    Rounding to bfloat16 is the maker's choice, so it changes what is ideal; rounding to int16 is
    percov2's, so it does not.
    """
    if kind == "float32":
        return case.logits, case
    if kind == "int16":
        return integer_logits(case.logits), case
    rounded = torch.from_numpy(case.logits).to(torch.bfloat16)
    return rounded, replace(case, logits=rounded.to(torch.float32).numpy())


def from_logits(case: Case, kind: str, effort: Effort) -> dict[str, Any]:
    """Logits -> bytes and back; ``kind`` is one of ``KINDS``."""
    bits = case.prob_bits
    logits, case = given_logits(case, kind)
    given = rans.intervals(logits, case.symbols, bits)
    _check_intervals(case, integer_logits(case.logits), given)
    streams = encode(case, logits, bits)
    decoder = rans.RansDecoder(*streams)
    check_decoded(case, decoder, decoder.decode_logits(logits, bits))
    return result(
        "logits",
        NAME,
        f"{kind} logits",
        case.shape,
        encode=measure(lambda: encode(case, logits, bits), effort),
        decode=measure(lambda: rans.RansDecoder(*streams).decode_logits(logits, bits), effort),
        stream_bytes=np.diff(streams[1]),
        ideal=ideal_bytes(case.logits, case.symbols),
    )
