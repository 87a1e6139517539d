"""Types of the compiled module (csrc/bindings*.cpp). Use it through percov2.entropy.

Arrays are C-contiguous and on the CPU; what they hold is said beside them. All raise ValueError for
another element type, shape or range than is said, and then nothing has changed.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

class _Array(Protocol):
    """A numpy array, a torch tensor or another array that speaks DLPack."""

    def __dlpack__(self) -> object: ...

_LogitType = str  # "int16", "float32" or "bfloat16"
_Bytes = bytes | bytearray | memoryview | _Array

def instruction_sets() -> tuple[str, ...]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def weight_table() -> NDArray[np.uint32]: ...
def intervals(
    logits: _Array, type: _LogitType, symbols: _Array, prob_bits: int, threads: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """logits [n, V] of that type, symbols int32 [n] -> starts, freqs [n]."""

def cdf(logits: _Array, type: _LogitType, prob_bits: int, threads: int) -> NDArray[np.int32]:
    """logits [n, V] of that type -> [n, V + 1]."""

def attention_weights(distances: NDArray[np.int32]) -> NDArray[np.uint8]: ...
def stage_attention(
    stages: _Array, bias: _Array, shift: _Array, gain_bits: int, q: _Array, kv: _Array
) -> NDArray[np.int8]:
    """One layer's attention in one pass over all stages -> [B, E, inner].

    stages int32 [h, w], bias int16 [heads, 964], shift int8 [heads], q int8 [B, E, inner], kv int8
    [B, K, 2 * inner]: keys, then values. The K keys are the start entries and the contents of all
    stages but the last, in coding order; the E readers are these and the queries of all positions.
    """

def cuda_built() -> bool: ...
def cuda_devices() -> tuple[str, ...]:
    """This and all cuda_ functions raise RuntimeError in a build without CUDA."""

def cuda_encode_sizes(streams: int, symbols: int) -> tuple[int, int, int]:
    """Bytes of scratch memory, of the head of ``packed``, and of the longest streams behind it."""

def cuda_encode(
    starts: _Array,
    freqs: _Array,
    counts: _Array | None,
    checks: _Array,
    prob_bits: int,
    scratch: _Array,
    packed: _Array,
    stream: int,
) -> None:
    """Tensors of one CUDA device; csrc/coder_cuda.h has the order of ``packed``.

    starts, freqs int32 [B, n]; counts, checks int32 [B]; scratch, packed uint8, 16-byte aligned.
    """

def cuda_decode(
    logits: _Array,
    rows: _Array | None,
    bytes: _Array,
    offsets: _Array,
    states: _Array,
    positions: _Array,
    prob_bits: int,
    symbols: _Array,
    status: _Array,
    stream: int,
) -> None:
    """Tensors of one CUDA device; the last four but prob_bits are written.

    logits int16 [B, n, V]; bytes uint8 [size]; offsets int64 [B + 1]; states int32 [B]; positions
    int64 [B]; symbols int32 [B, n]; status int32 [B]. With rows, int64 [B + 1], logits [1, n, V]
    and symbols [1, n] hold the rows of all streams.
    """

def resume_encoder(buffer: _Bytes, offsets: _Array, quiet: _Array) -> BatchEncoder:
    """buffer uint8 [n]; offsets int64 [B + 1]; quiet int64 [B]: finished streams to continue."""

class BatchEncoder:
    def __init__(self, checks: _Array) -> None:
        """checks uint32 [B], at most 65535."""

    def push(
        self, starts: _Array, freqs: _Array, counts: _Array, prob_bits: int, threads: int
    ) -> None:
        """starts, freqs int32 [sum(counts)]; counts int64 [B]; prob_bits 8 to 20."""

    def symbols_before_output(self) -> NDArray[np.int64]: ...
    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]: ...

class BatchDecoder:
    def __init__(
        self, buffer: _Bytes, offsets: _Array, states: _Array | None, positions: _Array | None
    ) -> None:
        """buffer uint8 [n]; offsets int64 [B + 1]; states uint32 [B] and positions int64 [B]."""

    def decode_logits(
        self, logits: _Array, type: _LogitType, streams: _Array, prob_bits: int, threads: int
    ) -> NDArray[np.int32]:
        """logits [b, n, V] of that type, streams int64 [b] -> [b, n]."""

    def decode_cdf(
        self, cdf: _Array, streams: _Array, prob_bits: int, trusted: bool, threads: int
    ) -> NDArray[np.int32]:
        """cdf int32 [b, n, V + 1], streams int64 [b] -> [b, n]."""

    def states(self) -> NDArray[np.uint32]: ...
    def positions(self) -> NDArray[np.int64]: ...
    def exhausted(self) -> NDArray[np.bool_]: ...
    def finished(self, checks: _Array) -> NDArray[np.bool_]:
        """checks uint32 [B]."""

class IntegerTransformer:
    def __init__(
        self,
        arrays: dict[str, Any],
        codebook_size: int,
        dim: int,
        heads: int,
        head_dim: int,
        layers: int,
        hidden: int,
    ) -> None: ...
    def logits(self, residual: Any, threads: int) -> NDArray[np.int16]: ...
    def encode(self, stages: Any, tokens: Any, threads: int) -> NDArray[np.int32]: ...

class StagedPass:
    def __init__(self, model: IntegerTransformer, stages: Any, batch: int) -> None: ...
    def residual(self, threads: int) -> NDArray[np.int32]: ...
    def accept(self, tokens: Any) -> None: ...
    def tokens(self) -> NDArray[np.int32]: ...
