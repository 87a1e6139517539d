"""Entropy coding with a model of your own: symbols to byte strings and back.

The symbols are coded at once or step by step. B streams are coded side by side from logits
[B, n, V], which may depend on all earlier symbols. A stream holds its symbols and a 16-bit check,
but not its length or its number of symbols: the caller must store these.

The decoder needs *the same* logits. A float model rarely returns the same bits on another machine
or in another batch, and one changed bit may change all later symbols. The check then refuses the
stream. Integer logits of an exact model (``IntTransformer``, or a table) are the same everywhere.

>>> import numpy as np
>>> logits = np.array([[[0, 256, 512], [512, 256, 0]]], np.int16)  # the last is 4 times the first
>>> streams = encode(logits, [[2, 0]])
>>> decode(streams, logits)
array([[2, 0]], dtype=int32)
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from itertools import groupby, pairwise
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.entropy import rans
from percov2.entropy.cdf import default_prob_bits, whole_bits
from percov2.entropy.ranges import whole_number
from percov2.entropy.rans import (
    ArrayLike,
    Logits,
    OneWay,
    RansDecoder,
    RansEncoder,
    as_bytes,
    codebook_size,
    returned,
    whole_array,
    whole_threads,
)

__all__ = ["SymbolDecoder", "SymbolEncoder", "decode", "encode"]


_CHECK_START = 0xFFFF
"""The check of an empty stream: a CRC-16 (CCITT) over the symbols as little-endian int32."""


class SymbolEncoder(OneWay):
    """An encoder of B streams that takes the symbols in reading order.

    Concurrent calls from several threads take turns.

    The last symbol is coded first, so the encoder keeps eight bytes per symbol until ``finish``.

    Args:
        batch: B, the number of streams.
        prob_bits: precision of the intervals, 8 to 20. None means ``default_prob_bits(V)`` for
            logits [B, n, V].
        threads: number of threads. It never changes a byte.

    Raises:
        ValueError: an argument is no whole number in its range.

    >>> import numpy as np
    >>> encoder = SymbolEncoder(batch=2)
    >>> encoder.encode(np.zeros((2, 3, 8), np.int16), [[7, 1, 2], [0, 0, 5]])
    >>> encoder.encode(np.zeros((2, 1, 100), np.int16), [[99], [42]])  # another codebook
    >>> [len(stream) for stream in encoder.finish()]
    [4, 4]
    """

    def __init__(self, batch: int, prob_bits: int | None = None, threads: int = 1) -> None:
        self._batch = whole_number("batch", batch, 1, 2**31 - 1)
        self._prob_bits = None if prob_bits is None else whole_bits(prob_bits)
        self._threads = whole_threads(threads)
        self._checks = [_CHECK_START] * self._batch
        self._turn = Lock()
        self._parts: list[tuple[int, NDArray[np.int32], NDArray[np.int32]]] = []

    def encode(self, logits: Logits, symbols: ArrayLike) -> None:
        """Append n symbols to each stream.

        Args:
            logits: [B, n, V], as for ``rans.intervals``.
            symbols: integers [B, n] in 0 .. V - 1.

        Raises:
            ValueError: a wrong shape, dtype, symbol or precision. Nothing has been appended then.
        """
        chosen = whole_array(symbols, "symbols")
        if chosen.ndim != 2 or len(chosen) != self._batch:
            raise ValueError(
                f"symbols have shape {chosen.shape}; they must be [{self._batch}, n], "
                "one row for each stream"
            )
        bits = _bits(self._prob_bits, logits)
        part = (bits, *rans.interval_arrays(logits, chosen, bits, self._threads))
        with self._turn:
            self._checks = _extended(self._checks, chosen)
            self._parts.append(part)

    def finish(self, checks: ArrayLike | None = None) -> list[bytes]:
        """Return the streams so far as B byte strings. You may append more symbols afterwards.

        Args:
            checks: uint16 [B], stored in place of the symbols' own checks. They can protect other
                data as well. None stores the checks of the symbols.

        Raises:
            ValueError: the checks are not B integers in 0 .. 65535.
        """
        with self._turn:
            own, said = self._checks, self._parts[::-1]
        encoder = RansEncoder(_one_each(own if checks is None else checks, self._batch))
        # The last symbol goes onto the stack first; a push takes symbols of one precision.
        for bits, group in groupby(said, key=lambda part: part[0]):
            parts = list(group)[::-1]
            starts = np.concatenate([part[1] for part in parts], axis=1)
            freqs = np.concatenate([part[2] for part in parts], axis=1)
            counts = np.full(self._batch, starts.shape[1], dtype=np.int64)
            encoder.encode(starts.ravel(), freqs.ravel(), counts, bits, self._threads)
        buffer, offsets = encoder.finish()
        data = buffer.tobytes()
        return [data[begin:end] for begin, end in pairwise(offsets.tolist())]


class SymbolDecoder(OneWay):
    """A reader of B streams written by ``SymbolEncoder``.

    Concurrent calls from several threads take turns.

    Args:
        streams: a list of at least one byte string.
        prob_bits, threads: as for ``SymbolEncoder``.

    Raises:
        ValueError: there is no stream, one is not bytes, or another argument is wrong.

    Do not trust the symbols before ``finish`` has returned: ``decode`` reads wrong symbols from a
    damaged stream without an error.

    >>> import numpy as np
    >>> logits = np.zeros((1, 2, 8), np.int16)
    >>> decoder = SymbolDecoder(encode(logits, [[3, 4]]))
    >>> decoder.decode(logits[:, :1]), decoder.decode(logits[:, 1:])
    (array([[3]], dtype=int32), array([[4]], dtype=int32))
    >>> decoder.finish()
    """

    def __init__(
        self, streams: Sequence[bytes], prob_bits: int | None = None, threads: int = 1
    ) -> None:
        single = isinstance(streams, str | bytes | bytearray | memoryview)
        if single or not isinstance(streams, Sequence | np.ndarray) or not len(streams):
            raise ValueError("give a list of at least one byte string, one for each stream")
        parts = [as_bytes(stream, f"stream {i}") for i, stream in enumerate(streams)]
        self._lengths = np.array([len(part) for part in parts], dtype=np.int64)
        self._prob_bits = None if prob_bits is None else whole_bits(prob_bits)
        self._threads = whole_threads(threads)
        self._checks = [_CHECK_START] * len(parts)
        self._turn = Lock()
        self._decoder = RansDecoder(b"".join(parts), np.cumsum([0, *self._lengths]))

    def decode(self, logits: Logits) -> Any:
        """Return the next n symbols of each stream: logits [B, n, V] -> int32 [B, n].

        The result is a tensor if the logits are a tensor, otherwise an array. The logits must equal
        those of ``encode`` bit for bit, but n may differ between the two.

        Raises:
            ValueError: a wrong shape, dtype or precision. Nothing has been read then.
        """
        bits = _bits(self._prob_bits, logits)
        with self._turn:
            symbols = self._decoder.decode_array(logits, bits, threads=self._threads)
            self._checks = _extended(self._checks, symbols)
        return returned(symbols, logits)

    def finish(self, checks: ArrayLike | None = None) -> None:
        """Raise ValueError unless every stream has been read to its end and matches its check.

        Args:
            checks: as for the encoder's ``finish``.
        """
        with self._turn:
            expected = _one_each(self._checks if checks is None else checks, len(self._lengths))
            valid, positions = self._decoder.finished(expected), self._decoder.positions
        for i in np.flatnonzero(~valid):
            name = f"stream {i} of {len(valid)}"
            if positions[i] < self._lengths[i]:
                raise ValueError(
                    f"{name} has bytes left: it is damaged, was made with other logits, or holds "
                    "more symbols"
                )
            raise ValueError(
                f"{name} does not match its check: it is damaged or cut, or was made with other "
                "logits or another number of symbols"
            )


def encode(
    logits: Logits,
    symbols: ArrayLike,
    prob_bits: int | None = None,
    threads: int = 1,
    checks: ArrayLike | None = None,
) -> list[bytes]:
    """Encode symbols [B, N] as B byte strings, given all their logits [B, N, V].

    The arguments and errors are those of ``SymbolEncoder``, its ``encode`` and its ``finish``.

    >>> import numpy as np
    >>> encode(np.zeros((2, 4, 256), np.int16), [[1, 2, 3, 4], [1, 2, 3, 4]])[0].hex()
    'c60102030440'
    """
    bits = _bits(prob_bits, logits)
    encoder = SymbolEncoder(logits.shape[0], bits, threads)
    encoder.encode(logits, symbols)
    return encoder.finish(checks)


def decode(
    streams: Sequence[bytes],
    logits: Logits,
    prob_bits: int | None = None,
    threads: int = 1,
    checks: ArrayLike | None = None,
) -> Any:
    """Decode the streams of ``encode`` with the same logits [B, N, V]. Return int32 [B, N].

    The result is a tensor if the logits are a tensor, otherwise an array. The arguments are those
    of ``SymbolDecoder``, its ``decode`` and its ``finish``. Raises ValueError for damaged streams.

    >>> import numpy as np
    >>> decode([bytes.fromhex("c60102030440")], np.zeros((1, 4, 256), np.int16))
    array([[1, 2, 3, 4]], dtype=int32)
    """
    decoder = SymbolDecoder(streams, prob_bits, threads)
    symbols = decoder.decode(logits)
    decoder.finish(checks)
    return symbols


def _bits(prob_bits: int | None, logits: Logits) -> int:
    """Return the precision for logits [B, n, V]. Raise ValueError if they have another shape."""
    try:
        shape = logits.shape
    except (AttributeError, RuntimeError):  # no array; torch's nested tensors have no shape
        shape = (0, 0, codebook_size(logits))
    if len(shape) != 3:
        raise ValueError(f"logits have shape {tuple(shape)}; they must be [B, n, V]")
    return default_prob_bits(shape[-1]) if prob_bits is None else prob_bits


def _extended(checks: Sequence[int], symbols: NDArray[Any]) -> list[int]:
    """Return the checks extended by symbols [B, n]."""
    rows = symbols.astype("<i4", copy=False)
    return [binascii.crc_hqx(row.tobytes(), c) for row, c in zip(rows, checks, strict=True)]


def _one_each(checks: ArrayLike, batch: int) -> ArrayLike:
    count = len(checks) if hasattr(checks, "__len__") and np.ndim(checks) else None
    if count != batch:
        found = f"a {type(checks).__name__}" if count is None else f"{count} numbers"
        raise ValueError(f"checks are {found} for {batch} streams; give one number for each")
    return checks
