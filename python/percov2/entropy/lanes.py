"""One long stream of several interleaved rANS states ("lanes").

A single rANS state makes a processor wait: the next symbol needs the state that the last one left.
With L lanes, symbol i belongs to lane i mod L, and L neighbouring symbols can be decoded at once,
though all lanes share one sequence of bytes. Each lane costs about 3.5 bytes; a stream of a million
symbols is within 0.01 % of its entropy with 16 lanes. docs/lanes.md is the format, to the byte. It
is a format of this library only: ``.pcv2`` files hold streams of ``percov2.entropy.rans``.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy.rans import (
    Logits,
    NativeLaneDecoder,
    NativeLaneEncoder,
    borrowed_logits,
)


class LaneEncoder:
    """A stack that becomes one byte string; what is pushed last is decoded first.

    lanes: 1 to 64; a decoder must be told the same number. check: 0 to 65535, which the decoder
    must meet at the end. Raises ValueError for anything else.

    >>> encoder = LaneEncoder(lanes=2, check=0xBEEF)
    >>> starts, freqs = np.array([[12, 20, 8], [4, 4, 4]], np.int32)
    >>> encoder.push(starts, freqs, prob_bits=8)
    >>> encoder.finish().tobytes().hex()
    '080bee0f200000140b'
    """

    def __init__(self, lanes: int, check: int = 0) -> None:
        self._native = NativeLaneEncoder(lanes, check)

    def push(
        self,
        starts: NDArray[np.int32] | torch.Tensor,
        freqs: NDArray[np.int32] | torch.Tensor,
        prob_bits: int,
    ) -> None:
        """Push n symbols, the last one first: contiguous int32 arrays [n] in decoding order.

        freq >= 1 and start + freq <= 2^prob_bits; prob_bits: 8 to 20, may differ from call to
        call. Raises ValueError, and then nothing was pushed.
        """
        self._native.push(starts, freqs, prob_bits)

    def finish(self) -> NDArray[np.uint8]:
        """The stream, uint8 [at least 4 * lanes]. More may be pushed, and finish called again."""
        return self._native.finish()


class LaneDecoder:
    """Reads one stream forward, in as many calls as you like.

    stream: bytes or contiguous uint8 [n], copied; lanes: as it was encoded. Raises ValueError
    unless the stream begins with that many states between 2^23 and 2^31 - 1.

    >>> decoder = LaneDecoder(bytes.fromhex("080bee0f200000140b"), lanes=2)
    >>> decoder.decode_logits(np.zeros((3, 64), np.int16), prob_bits=8)  # uniform: 4 slots each
    array([3, 5, 2], dtype=int32)
    >>> decoder.finished(0xBEEF)
    True
    """

    def __init__(
        self, stream: bytes | bytearray | memoryview | NDArray[np.uint8], lanes: int
    ) -> None:
        self._native = NativeLaneDecoder(stream, lanes)

    def decode_logits(self, logits: Logits, prob_bits: int) -> NDArray[np.int32]:
        """The next n symbols: logits [n, V] -> int32 [n].

        Beyond the end of a damaged stream the symbols mean nothing and stay in 0 .. V - 1: ask
        ``finished``. Raises ValueError for wrong shapes, dtypes, precision or float logits; nothing
        was decoded then.
        """
        return self._native.decode_logits(*borrowed_logits(logits), prob_bits)

    def decode_cdf(
        self, cdf: NDArray[np.int32] | torch.Tensor, prob_bits: int
    ) -> NDArray[np.int32]:
        """The next n symbols by tables: contiguous int32 [n, V + 1] -> int32 [n].

        Every table must increase strictly from 0 to 2^prob_bits. The rest is as in decode_logits.
        """
        return self._native.decode_cdf(cdf, prob_bits)

    def finished(self, check: int = 0) -> bool:
        """Whether the stream ends here, undamaged as far as its states can tell.

        True if every lane is back in its initial state, the last symbol's lane with the check, and
        all bytes are used up and none was missing. Raises ValueError if check does not fit 16 bits.
        """
        return self._native.finished(check)
