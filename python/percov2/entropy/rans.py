"""Batches of rANS streams: arrays in, one buffer and its offsets out.

Every stream is a stack (what is pushed last is decoded first) whose first state is a 16-bit check;
after the last symbol a decoder must hold that check and no byte. States are below 2^31, the lower
bound is 2^23, renormalisation is by bytes. Streams are independent, so ``threads`` never changes a
byte. This is the only module that imports the compiled code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

try:
    from percov2 import _native
except ImportError as error:  # pragma: no cover - only in a tree that was never built
    raise ImportError(
        "percov2's compiled coder is missing or does not fit this Python; install the package with "
        "pip, or build it in place as CONTRIBUTING.md says"
    ) from error

# For percov2.entropy.int_transformer, benchmark and tests; one module imports the compiled code.
attention_weights = _native.attention_weights
stage_attention = _native.stage_attention
IntegerTransformer = _native.IntegerTransformer
StagedPass = _native.StagedPass
# For percov2.entropy.torch.rans_cuda.
cuda_built = _native.cuda_built
cuda_devices = _native.cuda_devices
cuda_encode_sizes = _native.cuda_encode_sizes
cuda_encode = _native.cuda_encode
cuda_decode = _native.cuda_decode


def instruction_sets() -> tuple[str, ...]:
    """What the compiled kernels can use on this machine: "scalar" and "avx2", "avx512" or "neon".

    All give the same integers.
    """
    return _native.instruction_sets()


def instruction_set() -> str:
    """The instruction set in use: the best available one unless another was chosen."""
    return _native.instruction_set()


def use_instruction_set(name: str) -> None:
    """Make all compiled kernels use one instruction set, to compare or to measure them.

    Raises ValueError for a name that ``instruction_sets`` does not list.
    """
    _native.use_instruction_set(name)


def default_threads() -> int:
    """Return the threads that passes of the entropy model use.

    As many as torch has where it is loaded; else OMP_NUM_THREADS, or the cores of this process.
    """
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(asked) if asked.isdigit() else cores or 1)


def cuda_state() -> str:
    """For reports: "not built", "built, no device", or "built" with the names of the devices."""
    if not cuda_built():
        return "not built"
    try:
        return "built, " + (", ".join(cuda_devices()) or "no device")
    except RuntimeError as error:  # a driver that does not answer must not end a report
        return f"built, {error}"


Logits: TypeAlias = "NDArray[np.int16] | NDArray[np.float32] | torch.Tensor"
"""int16 base-2 logits in 1/256 of an octave, or natural-log float32 or bfloat16 logits.

The latter are rounded by ``percov2.entropy.cdf.round_logits``. Floats must be the same bits on both
sides of a stream; float models rarely give them twice. Those of percov2 give int16.
"""

ArrayLike: TypeAlias = "NDArray[Any] | torch.Tensor | Sequence[int]"


def is_tensor(value: Any) -> bool:
    """Return whether a value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_array(value: Any) -> NDArray[Any]:
    """Return an array or a tensor on any device as a contiguous array."""
    if is_tensor(value):
        value = value.detach().cpu().numpy()
    return np.ascontiguousarray(value)


def _integers(values: Any, dtype: Any, name: str) -> NDArray[Any]:
    """Integers as a contiguous array of ``dtype``; ValueError if one does not fit."""
    if is_tensor(values):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype == dtype:
        return _compact(array)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {array.dtype}; it must hold integers")
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise ValueError(
            f"{name} ranges from {array.min()} to {array.max()}; "
            f"it must stay in {limits.min} .. {limits.max}"
        )
    return np.ascontiguousarray(array.astype(dtype))


def _borrowed(values: Any, name: str) -> Any:
    """A contiguous and aligned array on the CPU; copied only if it is not one yet."""
    if is_tensor(values):
        tensor = values.detach().cpu().contiguous()
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{name} is a {type(values).__name__}; give a numpy array or a tensor")
    return _compact(values)


def _compact(array: NDArray[Any]) -> NDArray[Any]:
    """C-contiguous and aligned (a file mapped from an odd byte on is not)."""
    return np.require(array, requirements=("C", "A", "E"))


def borrowed_logits(values: Logits) -> tuple[Any, str]:
    """Contiguous logits on the CPU and the name of their dtype."""
    rows = _borrowed(values, "logits")
    if len(rows.shape) == 0:
        raise ValueError("logits have no axis; the last axis is the codebook")
    return rows, str(rows.dtype).removeprefix("torch.")


def intervals(
    logits: Logits,
    symbols: ArrayLike,
    prob_bits: int,
    threads: int = 1,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Intervals of chosen symbols, equal to percov2.entropy.cdf.intervals.

    logits [..., V], symbols int32 [...] in 0 .. V - 1 -> starts, freqs int32 [...].
    Raises ValueError for wrong shapes, dtypes, symbols or precision, and for float logits with NaN,
    +inf or nothing finite.
    """
    rows, dtype = borrowed_logits(logits)
    chosen = _integers(symbols, np.int32, "symbols")
    if tuple(rows.shape[:-1]) != chosen.shape:
        raise ValueError(
            f"symbols have shape {chosen.shape} for logits of {tuple(rows.shape)}; "
            "there must be one symbol for each row of logits"
        )
    flat = rows.reshape(chosen.size, rows.shape[-1])
    starts, freqs = _native.intervals(flat, dtype, chosen.reshape(-1), prob_bits, threads)
    return starts.reshape(chosen.shape), freqs.reshape(chosen.shape)


def cdf(logits: Logits, prob_bits: int, threads: int = 1) -> NDArray[np.int32]:
    """Interval bounds, equal to percov2.entropy.cdf.cdf: logits [..., V] -> int32 [..., V + 1].

    Raises ValueError for a wrong dtype, codebook size or precision, and for float logits with NaN,
    +inf or nothing finite.
    """
    rows, dtype = borrowed_logits(logits)
    lead = tuple(rows.shape[:-1])
    flat = rows.reshape(int(np.prod(lead, dtype=np.int64)), rows.shape[-1])
    return _native.cdf(flat, dtype, prob_bits, threads).reshape(*lead, rows.shape[-1] + 1)


class RansEncoder:
    """B stacks that become B byte strings.

    Threads that use one encoder, or one decoder, at the same time take turns.

    checks: uint16 [B], the initial state of each stream. Raises ValueError if one exceeds 65535.

    >>> encoder = RansEncoder(checks=[0xBEEF])
    >>> encoder.push(starts=[12, 20], freqs=[4, 4], counts=[2], prob_bits=8)
    >>> buffer, offsets = encoder.finish()
    >>> buffer.tobytes().hex(), offsets
    ('0beec50f', array([0, 4]))
    """

    def __init__(self, checks: ArrayLike) -> None:
        self._native = _native.BatchEncoder(_integers(checks, np.uint32, "checks"))

    @classmethod
    def resumed(cls, buffer: ArrayLike, offsets: ArrayLike, quiet: ArrayLike) -> RansEncoder:
        """Stacks that go on where finished streams, from here or from a GPU, end.

        buffer: uint8 [n]; offsets: int64 [B + 1]; quiet: int64 [B], their symbols_before_output.
        Raises ValueError for streams that no encoder writes.

        >>> first = RansEncoder([0xBEEF])
        >>> first.push(starts=[20], freqs=[4], counts=[1], prob_bits=8)
        >>> second = RansEncoder.resumed(*first.finish(), first.symbols_before_output)
        >>> second.push(starts=[12], freqs=[4], counts=[1], prob_bits=8)
        >>> second.finish()[0].tobytes().hex()
        '0beec50f'
        """
        encoder = cls.__new__(cls)
        encoder._native = _native.resume_encoder(
            _integers(buffer, np.uint8, "buffer"),
            _integers(offsets, np.int64, "offsets"),
            _integers(quiet, np.int64, "quiet"),
        )
        return encoder

    def push(
        self,
        starts: ArrayLike,
        freqs: ArrayLike,
        counts: ArrayLike,
        prob_bits: int,
        threads: int = 1,
    ) -> None:
        """Push counts[b] symbols on stream b, the last one first.

        starts, freqs: int32 flat [sum(counts)], stream after stream in decoding order, with
        freq >= 1 and start + freq <= 2^prob_bits; counts: int64 [B]; prob_bits: 8 to 20, may
        differ from call to call. Raises ValueError, and then nothing was pushed.
        """
        self._native.push(
            _integers(starts, np.int32, "starts"),
            _integers(freqs, np.int32, "freqs"),
            _integers(counts, np.int64, "counts"),
            prob_bits,
            threads,
        )

    @property
    def symbols_before_output(self) -> NDArray[np.int64]:
        """int64 [B]: symbols pushed while the state stayed below 2^23 and no byte had left.

        These are the symbols that a decoder meets in an exhausted stream (all so far if the state
        has never grown).
        """
        return self._native.symbols_before_output()

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The streams one after another, uint8 [sum of lengths], and offsets, int64 [B + 1].

        The stacks stay as they are: more may be pushed and finish called again.
        """
        return self._native.finish()


class RansDecoder:
    """Reads B streams forward.

    buffer: bytes or uint8 [n]; offsets: int64 [B + 1], not decreasing, within the buffer;
    states, positions: where to resume (uint32 [B] below 2^31 and int64 [B], the next byte counted
    from the stream's beginning), both or neither. Raises ValueError for anything else.

    >>> decoder = RansDecoder(bytes.fromhex("0beec50f"), offsets=[0, 4])
    >>> decoder.decode_logits(np.zeros((1, 2, 64), np.int16), prob_bits=8)  # uniform: 4 slots each
    array([[3, 5]], dtype=int32)
    >>> decoder.finished([0xBEEF])
    array([ True])
    """

    def __init__(
        self,
        buffer: bytes | bytearray | memoryview | ArrayLike,
        offsets: ArrayLike,
        states: ArrayLike | None = None,
        positions: ArrayLike | None = None,
    ) -> None:
        if (states is None) != (positions is None):
            raise ValueError("states and positions resume a stream together; give both or neither")
        if isinstance(buffer, bytes | bytearray | memoryview):
            buffer = np.frombuffer(buffer, dtype=np.uint8)
        self._native = _native.BatchDecoder(
            _integers(buffer, np.uint8, "buffer"),
            _integers(offsets, np.int64, "offsets"),
            None if states is None else _integers(states, np.uint32, "states"),
            None if positions is None else _integers(positions, np.int64, "positions"),
        )
        self._size = len(self._native.states())

    def _streams(self, streams: ArrayLike | None) -> NDArray[np.int64]:
        if streams is None:
            return np.arange(self._size, dtype=np.int64)
        return _integers(streams, np.int64, "streams")

    def decode_logits(
        self,
        logits: Logits,
        prob_bits: int,
        streams: ArrayLike | None = None,
        threads: int = 1,
    ) -> NDArray[np.int32]:
        """Decode n symbols per row: logits [B, n, V] -> int32 [B, n].

        streams: int64 [B], the stream of each row, no stream twice; all of them if None.
        Reading past the end gives symbols, not an error: ask ``finished``. Raises ValueError for
        wrong shapes, dtypes, streams, precision or float logits; nothing was decoded then.
        """
        rows, dtype = borrowed_logits(logits)
        return self._native.decode_logits(rows, dtype, self._streams(streams), prob_bits, threads)

    def decode_cdf(
        self,
        cdf: NDArray[np.int32] | torch.Tensor,
        prob_bits: int,
        streams: ArrayLike | None = None,
        threads: int = 1,
    ) -> NDArray[np.int32]:
        """Decode n symbols per row by tables: int32 [B, n, V + 1] -> int32 [B, n].

        Every table must increase strictly from 0 to 2^prob_bits. The rest is as in decode_logits.
        """
        return self._native.decode_cdf(
            _borrowed(cdf, "cdf"), self._streams(streams), prob_bits, threads
        )

    @property
    def states(self) -> NDArray[np.uint32]:
        """uint32 [B]: the states, all due bytes shifted in."""
        return self._native.states()

    @property
    def positions(self) -> NDArray[np.int64]:
        """int64 [B]: the next byte of each stream, counted from its beginning."""
        return self._native.positions()

    @property
    def exhausted(self) -> NDArray[np.bool_]:
        """bool [B]: no byte is left and the state is below 2^23."""
        return self._native.exhausted()

    def finished(self, checks: ArrayLike) -> NDArray[np.bool_]:
        """bool [B]: the state is the check (uint16 [B]) and no byte is left.

        A stream that was read from its beginning must not start with a zero byte either: an
        encoder never writes one, and each file has one form only.
        """
        return self._native.finished(_integers(checks, np.uint32, "checks"))
