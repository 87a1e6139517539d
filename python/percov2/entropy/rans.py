"""Batches of rANS streams: arrays in, one buffer and its offsets out.

Every stream is a stack: the symbol pushed last is decoded first. A stream's first state is a 16-bit
check. After the last symbol, a decoder's state must equal that check, with no byte left. States are
below 2^31, and a decoder refills a state below 2^23 with bytes. Streams are independent, so the
number of threads never changes a byte. Only this module imports the compiled code.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.cdf import check_codebook, whole_bits
from percov2.entropy.ranges import whole_number

if TYPE_CHECKING:
    import torch

try:
    from percov2 import _native
except ImportError as error:  # pragma: no cover - only in a tree that was never built
    raise ImportError(
        "percov2's compiled coder is missing or does not match this Python; install the package "
        "with pip, or build it in place as CONTRIBUTING.md says"
    ) from error

__all__ = [
    "ArrayLike",
    "IntegerTransformer",
    "Logits",
    "OneWay",
    "RansDecoder",
    "RansEncoder",
    "StagedPass",
    "as_array",
    "as_bytes",
    "attention_weights",
    "cdf",
    "codebook_size",
    "cuda_built",
    "cuda_decode",
    "cuda_devices",
    "cuda_encode",
    "cuda_encode_sizes",
    "cuda_state",
    "default_threads",
    "instruction_set",
    "instruction_sets",
    "integers",
    "interval_arrays",
    "intervals",
    "limited_threads",
    "returned",
    "stage_attention",
    "use_instruction_set",
    "whole_array",
    "whole_threads",
]


# For percov2.entropy.int_transformer, the benchmark and the tests.
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
    """Return the instruction sets that the compiled kernels can use on this machine.

    These are "scalar" and any of "avx2", "avx512" and "neon". All give the same integers.
    """
    return _native.instruction_sets()


def instruction_set() -> str:
    """Return the instruction set in use. The default is the best one available."""
    return _native.instruction_set()


def use_instruction_set(name: str) -> None:
    """Make all compiled kernels use one instruction set, for comparisons and measurements.

    Raises ValueError for a name that ``instruction_sets`` does not list.
    """
    _native.use_instruction_set(name)


def default_threads() -> int:
    """Return the number of threads for passes of the entropy model.

    Within ``limited_threads``, this is its limit. Otherwise, if torch is loaded, it is torch's
    number of threads. Otherwise it is OMP_NUM_THREADS, at most 1024, or, if that is not a number,
    the number of cores that this process may use.
    """
    if (limit := _LIMIT.get()) is not None:
        return limit
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if asked.isdecimal() and len(asked) < 20:
        return min(max(1, int(asked)), _MOST_THREADS)
    return _MOST_THREADS if asked.isdecimal() else cores or 1


_MOST_THREADS = 1024
"""Most threads of ``default_threads``."""


def whole_threads(threads: Any) -> int:
    """Return a number of threads as a plain int. Raise ValueError for anything else."""
    return whole_number("threads", threads, 1, 2**31 - 1)


_LIMIT: ContextVar[int | None] = ContextVar("percov2_threads", default=None)


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Make ``default_threads`` return ``count`` in this thread."""
    token = _LIMIT.set(count)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def cuda_state() -> str:
    """Return the state of the CUDA coder for reports.

    The text is "not built", "built, no device", or "built, " followed by the devices or by the
    driver's error.
    """
    if not cuda_built():
        return "not built"
    try:
        return "built, " + (", ".join(cuda_devices()) or "no device")
    except RuntimeError as error:  # a failing driver must not end a report
        return f"built, {error}"


Logits: TypeAlias = "NDArray[np.int16] | NDArray[np.float32] | torch.Tensor"
"""int16 base-2 logits in 1/256 of an octave, or natural-log float32 or bfloat16 logits.

``percov2.entropy.torch.cdf.round_logits`` rounds floats to int16. The encoder and the decoder must
use the same bits, and float models rarely give the same bits twice. percov2's models give int16.
"""

ArrayLike: TypeAlias = "NDArray[Any] | torch.Tensor | Sequence[int]"


def _is_tensor(value: Any) -> bool:
    """Return True for a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _check_held(values: Any, name: str) -> None:
    """Raise ValueError for a tensor whose values are not all in memory, and for masked elements."""
    if not _is_tensor(values):
        if "numpy.ma" in sys.modules and np.ma.is_masked(values):
            raise ValueError(f"{name} has masked elements; fill them first")
        return
    if values.is_meta or values.is_nested or values.layout is not sys.modules["torch"].strided:
        raise ValueError(f"{name} are a tensor without dense data; give a dense one")
    if values.device.type not in ("cpu", "cuda"):
        return  # such a tensor may have no address, and the copy to the CPU fails without values
    try:
        storage, count = values.untyped_storage(), values.numel()
        if count and not values.is_contiguous():
            steps = zip(values.shape, values.stride(), strict=True)
            count = 1 + sum((side - 1) * step for side, step in steps)
        end = (values.storage_offset() + count) * values.element_size()
        inside = end <= storage.nbytes() and storage.device.type != "meta"
        held = count == 0 or (inside and values.data_ptr() != 0)
    except RuntimeError:  # inside torch.func
        held = False
    if not held:
        raise ValueError(f"{name} are a tensor without data, as tracing and freeing leave it")


def _on_cpu(tensor: Any) -> Any:
    """Return a tensor on the CPU, with the sign and the imaginary part that its flags promise."""
    return tensor.detach().cpu().resolve_conj().resolve_neg()


def _array(values: Any, name: str) -> NDArray[Any]:
    """Return an array, a tensor or numbers as an array, without a copy where possible."""
    _check_held(values, name)
    if not _is_tensor(values):
        return np.asarray(values)
    try:
        return _on_cpu(values).numpy()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{name} has dtype {values.dtype}, which numpy lacks") from error


def as_array(values: Any, name: str = "the array") -> NDArray[Any]:
    """Return an array or a tensor on any device as a contiguous array of this machine's byte order.

    Raises ValueError, with ``name``, for masked elements and for a tensor whose values are not in
    memory or not of a dtype of numpy.
    """
    return _aligned(_array(values, name))


def as_bytes(stream: Any, name: str) -> memoryview:
    """Return the bytes of an object. Raise ValueError for one with elements of another size."""
    try:
        view = memoryview(stream)
    except TypeError:
        raise ValueError(f"{name} is a {type(stream).__name__}; it must be bytes") from None
    if view.itemsize != 1 or view.ndim != 1 or not view.c_contiguous:
        raise ValueError(
            f"{name} has shape {view.shape} and elements of {view.itemsize} bytes in steps of "
            f"{view.strides}; it must be bytes, one after another"
        )
    return view


def returned(array: NDArray[Any], like: Any) -> Any:
    """Return the array, or a tensor on the device of ``like`` if ``like`` is a tensor."""
    return sys.modules["torch"].from_numpy(array).to(like.device) if _is_tensor(like) else array


def whole_array(values: Any, name: str) -> NDArray[Any]:
    """Return integers of any dtype as an array. Raise ValueError for other numbers."""
    array = _array(values, name)
    if array.dtype.kind in "iu" or array.size == 0:
        return array
    if not hasattr(values, "dtype"):
        # numpy makes floats or objects of a list with integers from 2^63 on.
        exact = np.asarray(values, dtype=object)
        if all(isinstance(value, Integral) and not isinstance(value, bool) for value in exact.flat):
            raise ValueError(
                f"{name} ranges from {exact.min()} to {exact.max()}; it must stay below 2^63"
            )
    raise ValueError(f"{name} has dtype {array.dtype}; it must contain integers")


def _fitting(array: NDArray[Any], dtype: Any, name: str) -> NDArray[Any]:
    """Return integers as a contiguous array of ``dtype``. Raise ValueError if one does not fit."""
    if array.dtype == dtype:
        return _aligned(array)
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise ValueError(
            f"{name} ranges from {array.min()} to {array.max()}; "
            f"it must stay in {limits.min} .. {limits.max}"
        )
    return np.ascontiguousarray(array.astype(dtype))


def integers(values: Any, dtype: Any, name: str) -> NDArray[Any]:
    """Return integers as a contiguous array of ``dtype``. Raise ValueError for anything else."""
    return _fitting(whole_array(values, name), dtype, name)


def _contiguous(values: Any) -> Any:
    """Return an array or a tensor contiguous and aligned on the CPU, copied where necessary."""
    if not _is_tensor(values):
        return _aligned(values)
    tensor = _on_cpu(values).contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _check_lent(values: Any, name: str) -> None:
    """Raise ValueError unless ``values`` is an array or a tensor with all its values in memory."""
    if not _is_tensor(values) and not isinstance(values, np.ndarray):
        raise ValueError(f"give a numpy array or a tensor as {name}, not a {type(values).__name__}")
    _check_held(values, name)


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array C-contiguous and aligned; a file mapped from an odd offset is unaligned."""
    if array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative:
        return np.asarray(array)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.require(native, requirements=("C", "A", "E"))


def codebook_size(logits: Logits) -> int:
    """Return the size of the last axis of logits.

    Raises ValueError for anything but a numpy array or a tensor in memory, and for a wrong size.
    """
    _check_lent(logits, "logits")
    if len(logits.shape) == 0:
        raise ValueError("logits have no axis; the last axis is the codebook")
    return check_codebook(logits.shape[-1])


def _borrowed_logits(values: Logits) -> tuple[Any, str]:
    """Return contiguous logits on the CPU and the name of their dtype."""
    rows = _contiguous(values)
    return rows, str(rows.dtype).removeprefix("torch.")


_MOST_COPIED = 1 << 24
"""Bytes of logits that are copied at once if they are not contiguous."""


def _step(logits: Any) -> int | None:
    """Return how many entries of the last axis but one are copied at a time, or None for all.

    Contiguous logits are not copied. A broadcast row, whose strides are 0, may stand for gigabytes.
    """
    held = logits.is_contiguous() if _is_tensor(logits) else logits.flags.c_contiguous
    size = logits.dtype.itemsize * math.prod(logits.shape)
    if held or len(logits.shape) < 2 or size <= _MOST_COPIED:
        return None
    return max(1, logits.shape[-2] * _MOST_COPIED // size)


def _parts(logits: Any, step: int) -> Iterator[slice]:
    """Yield slices of the last axis but one."""
    for begin in range(0, logits.shape[-2], step):
        yield slice(begin, begin + step)


def _check_finite(logits: Any, step: int) -> None:
    """Raise ValueError for wrong float logits in any part, before one is decoded."""
    for part in _parts(logits, step):
        rows, dtype = _borrowed_logits(logits[..., part, :])
        if dtype.startswith(("float", "bfloat")):
            largest = as_array(
                rows.amax(-1).float() if _is_tensor(rows) else rows.max(-1), "logits"
            )
            if not np.isfinite(largest).all():
                raise ValueError("a row of the logits holds NaN or +inf, or nothing finite")


def intervals(
    logits: Logits,
    symbols: ArrayLike,
    prob_bits: int,
    threads: int = 1,
) -> tuple[Any, Any]:
    """Return the intervals of symbols.

    Args:
        logits: [..., V].
        symbols: int32 [...] in 0 .. V - 1.
        prob_bits: precision of the intervals, 8 to 20.
        threads: number of threads.

    Returns:
        (starts, freqs), int32 [...]: tensors if the logits are a tensor, otherwise arrays.

    Raises:
        ValueError: a wrong shape, dtype, symbol or precision, or a row of float logits with NaN,
            with +inf or without a finite value.
    """
    starts, freqs = interval_arrays(logits, symbols, prob_bits, threads)
    return returned(starts, logits), returned(freqs, logits)


def interval_arrays(
    logits: Logits, symbols: ArrayLike, prob_bits: int, threads: int = 1
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return what ``intervals`` returns, as arrays also if the logits are a tensor."""
    prob_bits, threads = whole_bits(prob_bits), whole_threads(threads)
    codebook_size(logits)
    chosen = whole_array(symbols, "symbols")
    if tuple(logits.shape[:-1]) != chosen.shape:
        raise ValueError(
            f"symbols have shape {chosen.shape} for logits of {tuple(logits.shape)}; "
            "there must be one symbol for each row of logits"
        )
    if (step := _step(logits)) is not None:
        # All memory at once: broadcast rows may be more than any machine can hold the results of.
        starts, freqs = (np.empty(chosen.shape, dtype=np.int32) for _ in range(2))
        for part in _parts(logits, step):
            starts[..., part], freqs[..., part] = interval_arrays(
                logits[..., part, :], chosen[..., part], prob_bits, threads
            )
        return starts, freqs
    rows, dtype = _borrowed_logits(logits)
    chosen = _fitting(chosen, np.int32, "symbols")
    flat = rows.reshape(chosen.size, rows.shape[-1])
    starts, freqs = _native.intervals(flat, dtype, chosen.reshape(-1), prob_bits, threads)
    return starts.reshape(chosen.shape), freqs.reshape(chosen.shape)


def cdf(logits: Logits, prob_bits: int, threads: int = 1) -> Any:
    """Return the interval bounds of all symbols: logits [..., V] -> int32 [..., V + 1].

    The result is a tensor if the logits are a tensor, otherwise an array.

    Raises:
        ValueError: a wrong dtype, codebook size or precision, or a row of float logits with NaN,
            with +inf or without a finite value.
    """
    prob_bits, threads = whole_bits(prob_bits), whole_threads(threads)
    codebook_size(logits)  # before a copy of a broadcast axis
    rows, dtype = _borrowed_logits(logits)
    lead = tuple(rows.shape[:-1])
    flat = rows.reshape(int(np.prod(lead, dtype=np.int64)), rows.shape[-1])
    bounds = _native.cdf(flat, dtype, prob_bits, threads).reshape(*lead, rows.shape[-1] + 1)
    return returned(bounds, logits)


class OneWay:
    """A coder between two symbols of its streams. It is never copied or pickled."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is in the middle of its streams and cannot be copied or "
            "pickled; pass on finished streams, or data to make another one from"
        )


class RansEncoder(OneWay):
    """B stacks that become B byte strings. Concurrent calls from several threads take turns.

    Args:
        checks: uint16 [B], the initial state of each stream.

    Raises:
        ValueError: a check exceeds 65535.

    >>> encoder = RansEncoder(checks=[0xBEEF])
    >>> encoder.encode(starts=[12, 20], freqs=[4, 4], counts=[2], prob_bits=8)
    >>> buffer, offsets = encoder.finish()
    >>> buffer.tobytes().hex(), offsets
    ('0beec50f', array([0, 4]))
    """

    def __init__(self, checks: ArrayLike) -> None:
        self._native = _native.BatchEncoder(integers(checks, np.uint32, "checks"))

    @classmethod
    def resumed(cls, buffer: ArrayLike, offsets: ArrayLike, quiet: ArrayLike) -> RansEncoder:
        """Return an encoder that continues finished streams of this class or of a GPU.

        Args:
            buffer: uint8 [n], the streams one after another.
            offsets: int64 [B + 1].
            quiet: int64 [B], the ``symbols_before_output`` of the finished streams.

        Raises:
            ValueError: no encoder writes such streams.

        >>> first = RansEncoder([0xBEEF])
        >>> first.encode(starts=[20], freqs=[4], counts=[1], prob_bits=8)
        >>> second = RansEncoder.resumed(*first.finish(), first.symbols_before_output)
        >>> second.encode(starts=[12], freqs=[4], counts=[1], prob_bits=8)
        >>> second.finish()[0].tobytes().hex()
        '0beec50f'
        """
        encoder = cls.__new__(cls)
        encoder._native = _native.resume_encoder(
            integers(buffer, np.uint8, "buffer"),
            integers(offsets, np.int64, "offsets"),
            integers(quiet, np.int64, "quiet"),
        )
        return encoder

    def encode(
        self,
        starts: ArrayLike,
        freqs: ArrayLike,
        counts: ArrayLike,
        prob_bits: int,
        threads: int = 1,
    ) -> None:
        """Push counts[b] symbols onto stream b, the last symbol first.

        Args:
            starts: int32 [sum(counts)], stream after stream in decoding order.
            freqs: int32 [sum(counts)], with freq >= 1 and start + freq <= 2^prob_bits.
            counts: int64 [B].
            prob_bits: 8 to 20. It may change between calls.
            threads: number of threads.

        Raises:
            ValueError: an argument is invalid. Nothing has been pushed then.
        """
        self._native.push(
            integers(starts, np.int32, "starts"),
            integers(freqs, np.int32, "freqs"),
            integers(counts, np.int64, "counts"),
            whole_bits(prob_bits),
            whole_threads(threads),
        )

    @property
    def symbols_before_output(self) -> NDArray[np.int64]:
        """Return the number of symbols that each stream held before its first byte, int64 [B].

        The states of these symbols are below 2^23: a decoder reads them from an exhausted stream.
        """
        return self._native.symbols_before_output()

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the streams one after another, uint8 [sum of lengths], and offsets, int64 [B + 1].

        The stacks do not change, so you may push more symbols and call ``finish`` again.
        """
        return self._native.finish()


class RansDecoder(OneWay):
    """A reader of B streams.

    Args:
        buffer: bytes or uint8 [n].
        offsets: int64 [B + 1], not decreasing, within the buffer.
        states: uint32 [B] below 2^31, to resume streams. None reads from the beginning.
        positions: int64 [B], the next byte of each stream, counted from the stream's beginning.
            Give both ``states`` and ``positions``, or neither.

    Raises:
        ValueError: an argument is invalid.

    >>> decoder = RansDecoder(bytes.fromhex("0beec50f"), offsets=[0, 4])
    >>> decoder.decode(np.zeros((1, 2, 64), np.int16), prob_bits=8)  # uniform: 4 slots each
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
            buffer = np.frombuffer(as_bytes(buffer, "buffer"), dtype=np.uint8)
        self._native = _native.BatchDecoder(
            integers(buffer, np.uint8, "buffer"),
            integers(offsets, np.int64, "offsets"),
            None if states is None else integers(states, np.uint32, "states"),
            None if positions is None else integers(positions, np.int64, "positions"),
        )
        self._size = len(self._native.states())

    def _streams(self, streams: ArrayLike | None) -> NDArray[np.int64]:
        if streams is None:
            return np.arange(self._size, dtype=np.int64)
        return integers(streams, np.int64, "streams")

    def decode(
        self,
        logits: Logits,
        prob_bits: int,
        streams: ArrayLike | None = None,
        threads: int = 1,
    ) -> Any:
        """Decode n symbols per row: logits [B, n, V] -> int32 [B, n].

        The result is a tensor if the logits are a tensor, otherwise an array. Reading past the end
        of a stream returns symbols without an error; ``finished`` detects it.

        Args:
            logits: [B, n, V].
            prob_bits: precision of the intervals, 8 to 20.
            streams: int64 [B], the stream of each row, each stream at most once. None means all
                streams in order.
            threads: number of threads.

        Raises:
            ValueError: a wrong shape, dtype, stream or precision, or wrong float logits. Nothing
                has been decoded then.
        """
        return returned(self.decode_array(logits, prob_bits, streams, threads), logits)

    def decode_array(
        self,
        logits: Logits,
        prob_bits: int,
        streams: ArrayLike | None = None,
        threads: int = 1,
    ) -> NDArray[np.int32]:
        """Return what ``decode`` returns, as an array also if the logits are a tensor."""
        prob_bits, threads = whole_bits(prob_bits), whole_threads(threads)
        codebook_size(logits)
        chosen, step = self._streams(streams), _step(logits)
        if step is None:
            rows, dtype = _borrowed_logits(logits)
            return self._native.decode_logits(rows, dtype, chosen, prob_bits, threads)
        # All memory at once: broadcast rows may be more than any machine can hold the results of.
        symbols = np.empty(tuple(logits.shape[:-1]), dtype=np.int32)
        _check_finite(logits, step)
        for part in _parts(logits, step):
            rows, dtype = _borrowed_logits(logits[..., part, :])
            symbols[:, part] = self._native.decode_logits(rows, dtype, chosen, prob_bits, threads)
        return symbols

    def decode_cdf(
        self,
        cdf: NDArray[np.int32] | torch.Tensor,
        prob_bits: int,
        streams: ArrayLike | None = None,
        threads: int = 1,
        trusted: bool = False,
    ) -> Any:
        """Decode n symbols per row with tables of bounds: int32 [B, n, V + 1] -> int32 [B, n].

        Every table must increase strictly from 0 to 2^prob_bits.

        Args:
            cdf: the tables, for example of ``rans.cdf``.
            prob_bits, streams, threads: as for ``decode``.
            trusted: False checks every bound of every table, which reads all of it. True reads only
                the bounds that the search needs and checks the interval that it finds. This is
                several times as fast for large codebooks. With an invalid table, it may return a
                wrong symbol instead of an error.

        Raises:
            ValueError: an invalid table, or as for ``decode``. Nothing has been decoded then.
        """
        prob_bits, threads = whole_bits(prob_bits), whole_threads(threads)
        if not isinstance(trusted, bool | np.bool_):
            raise ValueError(f"trusted is {trusted!r}; it must be True or False")
        _check_lent(cdf, "cdf")
        tables, chosen = _contiguous(cdf), self._streams(streams)
        symbols = self._native.decode_cdf(tables, chosen, prob_bits, bool(trusted), threads)
        return returned(symbols, cdf)

    @property
    def states(self) -> NDArray[np.uint32]:
        """Return the state of each stream after its last refill, uint32 [B]."""
        return self._native.states()

    @property
    def positions(self) -> NDArray[np.int64]:
        """Return the next byte of each stream, counted from the stream's beginning, int64 [B]."""
        return self._native.positions()

    @property
    def exhausted(self) -> NDArray[np.bool_]:
        """Return bool [B], True for each stream with no byte left and a state below 2^23."""
        return self._native.exhausted()

    def finished(self, checks: ArrayLike) -> NDArray[np.bool_]:
        """Return bool [B], True for each stream whose state is its check, with no byte left.

        ``checks`` is uint16 [B].

        A stream that was read from its beginning must not start with a zero byte either. No encoder
        writes one, and each file must have only one valid form.
        """
        return self._native.finished(integers(checks, np.uint32, "checks"))
