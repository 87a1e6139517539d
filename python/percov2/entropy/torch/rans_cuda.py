"""Batches of rANS streams on a CUDA device, with the same bytes as percov2.entropy.rans.

Everything stays on the device, on torch's current stream. Only ``EncodedStreams.to_host`` (one
copy), ``finished`` and ``exhausted`` (a few bytes) wait for the device.
docs/explanation/gpu-kernels.md describes the kernels. In a build without CUDA every call raises
RuntimeError.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy import rans

__all__ = ["CAPABILITY", "DEVICE_TYPE", "CudaRansDecoder", "EncodedStreams", "encode", "queue"]


DEVICE_TYPE = "cuda"
CAPABILITY = (8, 0)
"""The lowest compute capability that the kernels support."""

_FAULTS = {
    1: "an interval is empty or not inside 0 .. 2^prob_bits",
    2: "its count is negative or exceeds the intervals given",
    3: "its check exceeds 16 bits",
    5: "it does not lie in the buffer",
    6: "its state is not below 2^31",
    7: "its position is not in the stream",
    8: "its rows are not among those of the logits",
}
"""Messages for the faults of CudaStatus in csrc/cuda/coder_cuda.h."""


def queue(device: torch.device) -> int:
    """Return torch's current stream on ``device`` as a number, or 0 for the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _require(tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.device.type != DEVICE_TYPE:
        raise ValueError(f"{name} is on {tensor.device}; it must be on a {DEVICE_TYPE} device")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} {shape}"
        )


def _refuse(status: NDArray[np.int32]) -> None:
    """Raise ValueError for the first stream with a fault."""
    if status.any():
        b = int(np.flatnonzero(status)[0])
        raise ValueError(f"stream {b}: {_FAULTS[int(status[b])]}")


@dataclass(frozen=True)
class EncodedStreams:
    """Finished streams that are still on the device.

    Attributes:
        packed: one uint8 buffer. It holds the offsets int64 [B + 1], the status int32 [B], quiet
            int32 [B] (the number of symbols before a stream's first output), padding up to a
            multiple of 16 bytes, and the streams one after another.
        size: number of streams B.
        head: number of bytes before the first stream.
        likely: number of stream bytes that the first copy takes.
    """

    packed: torch.Tensor
    size: int
    head: int
    likely: int

    def to_host(self) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
        """Return (buffer, offsets, quiet): uint8 [n], int64 [B + 1], int64 [B].

        These are the arguments of ``RansEncoder.resumed``. The call waits for one copy, or for two
        copies if the streams exceed ``likely`` bytes. Raises ValueError if an interval, a count or
        a check was invalid.
        """
        first = self.packed[: self.head + self.likely].cpu().numpy()
        b = self.size
        offsets = first[: 8 * (b + 1)].view(np.int64)
        status, quiet = first[8 * (b + 1) : 16 * b + 8].view(np.int32).reshape(2, b)
        _refuse(status)
        length = int(offsets[-1])
        buffer = first[self.head : self.head + length]
        if length > self.likely:
            rest = self.packed[self.head + self.likely : self.head + length]
            buffer = np.concatenate([buffer, rest.cpu().numpy()])
        return buffer, offsets, quiet.astype(np.int64)


def encode(
    starts: torch.Tensor,
    freqs: torch.Tensor,
    checks: torch.Tensor,
    prob_bits: int,
    counts: torch.Tensor | None = None,
) -> EncodedStreams:
    """Encode B streams on the device of ``starts``. Queue two kernels without waiting.

    Args:
        starts: int32 [B, n] in decoding order.
        freqs: int32 [B, n], with freq >= 1 and start + freq <= 2^prob_bits.
        checks: int32 [B] in 0 .. 65535, the initial states.
        prob_bits: precision of the intervals, 8 to 20.
        counts: int32 [B]. Only the first counts[b] intervals of row b belong to stream b. None
            means all intervals.

    Raises:
        ValueError: a wrong device, dtype or shape, or ``prob_bits`` out of range. The device checks
            the values in the tensors, and ``EncodedStreams.to_host`` raises ValueError for them.
        RuntimeError: the build has no CUDA.
    """
    if starts.dim() != 2:
        raise ValueError(f"starts has shape {tuple(starts.shape)}; it must be [B, n]")
    size, symbols = starts.shape
    _require(starts, "starts", torch.int32, (size, symbols))
    _require(freqs, "freqs", torch.int32, (size, symbols))
    _require(checks, "checks", torch.int32, (size,))
    if counts is not None:
        _require(counts, "counts", torch.int32, (size,))
        counts = counts.contiguous()
    scratch_bytes, head, most = rans.cuda_encode_sizes(size, symbols)
    device = starts.device
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
    packed = torch.empty(head + most, dtype=torch.uint8, device=device)
    rans.cuda_encode(
        starts.contiguous(),
        freqs.contiguous(),
        counts,
        checks.contiguous(),
        prob_bits,
        scratch,
        packed,
        queue(device),
    )
    # 5/8 of prob_bits are 10, 11.25 and 12.5 bits at the precision of 256, 1024 and 8192 tokens.
    # A useful model needs fewer, and copying that many is still fast.
    likely = min(most, size * (symbols * prob_bits * 5 // 64 + 8))
    return EncodedStreams(packed, size, head, likely)


class CudaRansDecoder:
    """A reader of B streams that keeps its whole state on a device.

    Args:
        buffer: uint8 [n] on the CPU or on the device.
        offsets: int64 [B + 1], not decreasing, within the buffer.
        device: a CUDA device.
        states: int32 [B], to resume streams. None reads from the beginning.
        positions: int64 [B], the next byte of each stream, counted from the stream's beginning.
            Give both ``states`` and ``positions``, or neither.

    Attributes:
        states: int32 [B] on the device, after the last refill.
        positions: int64 [B] on the device.
    """

    def __init__(
        self,
        buffer: torch.Tensor,
        offsets: torch.Tensor,
        device: torch.device | str,
        states: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        if (states is None) != (positions is None):
            raise ValueError("states and positions resume a stream together; give both or neither")
        if offsets.dim() != 1 or offsets.numel() == 0:
            raise ValueError("offsets must hold one number more than streams")
        device = torch.device(device)
        self.size = offsets.numel() - 1
        self._fresh = states is None
        self._buffer = buffer.to(device, non_blocking=True).contiguous()
        self._offsets = offsets.to(device, non_blocking=True).contiguous()
        if states is None or positions is None:
            self.states = torch.zeros(self.size, dtype=torch.int32, device=device)
            self.positions = torch.zeros(self.size, dtype=torch.int64, device=device)
        else:  # copies: kernels write to them
            self.states = torch.empty(self.size, dtype=torch.int32, device=device).copy_(states)
            self.positions = torch.empty(self.size, dtype=torch.int64, device=device).copy_(
                positions
            )
        _require(self._buffer, "buffer", torch.uint8, (buffer.numel(),))
        _require(self._offsets, "offsets", torch.int64, (self.size + 1,))
        self._faults = torch.zeros(self.size, dtype=torch.int32, device=device)
        self._decode(torch.zeros(self.size, 0, 2, dtype=torch.int16, device=device), 8)

    def _decode(
        self, logits: torch.Tensor, prob_bits: int, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        symbols = torch.empty(logits.shape[:2], dtype=torch.int32, device=logits.device)
        status = torch.empty(self.size, dtype=torch.int32, device=logits.device)
        rans.cuda_decode(
            logits.contiguous(),
            rows,
            self._buffer,
            self._offsets,
            self.states,
            self.positions,
            prob_bits,
            symbols,
            status,
            queue(logits.device),
        )
        self._faults = torch.maximum(self._faults, status)
        return symbols

    def decode(self, logits: torch.Tensor, prob_bits: int, threads: int = 1) -> torch.Tensor:
        """Decode n symbols per stream: int16 logits [B, n, V] -> int32 [B, n] on the device.

        The call queues one kernel and ignores ``threads``, which only decoders on the CPU use.
        Reading past the end of a stream returns symbols without an error; ``finished`` detects it.

        Raises:
            ValueError: a wrong device, shape, dtype or precision. Nothing has been decoded then.
        """
        if logits.dim() != 3:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; they must be [B, n, V]")
        _require(logits, "logits", torch.int16, (self.size, *logits.shape[1:]))
        return self._decode(logits, prob_bits)

    def decode_rows(self, logits: torch.Tensor, rows: torch.Tensor, prob_bits: int) -> torch.Tensor:
        """Decode unequal numbers of symbols: int16 logits [1, n, V] -> int32 [1, n] on the device.

        Stream b decodes the rows from rows[b] up to rows[b + 1]. ``rows`` is int64 [B + 1] on the
        device, which checks it. The call queues one kernel. Symbols in no stream's rows are
        undefined.

        Raises:
            ValueError: as for ``decode``.
        """
        if logits.dim() != 3:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; they must be [1, n, V]")
        _require(logits, "logits", torch.int16, (1, *logits.shape[1:]))
        _require(rows, "rows", torch.int64, (self.size + 1,))
        return self._decode(logits, prob_bits, rows.contiguous())

    def _ended(self) -> torch.Tensor:
        return self.positions == self._offsets[1:] - self._offsets[:-1]

    @property
    def exhausted(self) -> NDArray[np.bool_]:
        """Return bool [B], True for each stream with no byte left and a state below 2^23.

        The call waits for the device. Raises ValueError if offsets, states or positions were
        invalid.
        """
        return self._answer(self._ended() & (self.states < 1 << 23))

    def finished(self, checks: rans.ArrayLike) -> NDArray[np.bool_]:
        """Return bool [B], True for each stream whose state is its check, with no byte left.

        ``checks`` is uint16 [B].

        A stream that was read from its beginning must not start with a zero byte either. The call
        waits for the device. Raises ValueError if offsets, states or positions were invalid.
        """
        wanted = torch.as_tensor(checks).to(self.states.device, non_blocking=True)
        right = self._ended() & (self.states == wanted)
        if self._fresh and self._buffer.numel():
            begins = self._offsets[:-1].clamp(0, self._buffer.numel() - 1)
            empty = self._offsets[1:] == self._offsets[:-1]
            right &= empty | (self._buffer[begins] != 0)
        return self._answer(right)

    def _answer(self, flags: torch.Tensor) -> NDArray[np.bool_]:
        flag, faults = torch.stack([flags.to(torch.int32), self._faults]).cpu().numpy()
        _refuse(faults)
        return flag.astype(np.bool_)
