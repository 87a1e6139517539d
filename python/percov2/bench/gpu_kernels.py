"""The GPU kernels at given sizes: what launches move, compute and wait for (gpu-kernels.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from percov2.bench import gpu_sources
from percov2.bench.gpu_compiled import Source
from percov2.entropy import entries, schedule
from percov2.entropy.reader_plan import plan_readers
from percov2.entropy.transformer_config import TransformerConfig

SCHEDULE = "qlds12"
LATENT = 32
"""Length of the quantizer's vectors (percov2.models.quantizer)."""

# Counted in nvcc's machine code for sm_90, see docs/gpu-kernels.md.
ENCODE_INSTRUCTIONS = 26
"""Per symbol of a stream."""
ENCODE_CYCLES, ENCODE_GROUP_CYCLES = 40, 400
"""Of the chain of states: per symbol, and per 32 symbols for all that lies between the chains."""
DECODE_INSTRUCTIONS = {True: (247, 203), False: (247, 226)}
"""Per symbol, and per 256 logits of it; with 128-bit loads and without."""
DECODE_CYCLES = (430, 270)
"""What a warp alone needs: per symbol, and per 256 logits of it."""
PACK_CYCLES = 300
"""Of a load from L2 that the next one waits for."""
LOOKUP_CYCLES = 8
"""Of a multiprocessor, for 32 lookups in a table of 1 KiB: as many cache lines as they may hit."""


@dataclass(frozen=True)
class Size:
    """``images`` of ``tokens`` each (a square grid), and a model for a codebook."""

    images: int
    tokens: int
    config: TransformerConfig

    @property
    def side(self) -> int:
        """Side of the grid. Raises ValueError unless the grid is a square."""
        side = math.isqrt(self.tokens)
        if side * side != self.tokens:
            raise ValueError(f"{self.tokens} tokens are no square grid")
        return side

    @property
    def symbols(self) -> int:
        """Tokens of all images."""
        return self.images * self.tokens


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        grid, warps: blocks, and warps of a block.
        bytes: that must cross the memory's bus: every operand once, every result once.
        source: of a Triton kernel; its instructions are counted in the machine code, with loops
            passed ``trips`` times.
        instructions: of all warps, where they are not counted there.
        chain_cycles: of the longest chain of instructions that wait for each other.
        lookup_cycles: all lookups in tables together, in cycles of one multiprocessor.
        tensor_ops: int8 operations of tensor cores.
    """

    grid: int
    warps: int
    bytes: float
    source: Source | None = None
    trips: tuple[float, ...] = ()
    instructions: float | None = None
    chain_cycles: float = 0.0
    lookup_cycles: float = 0.0
    tensor_ops: float = 0.0


@dataclass(frozen=True)
class Row:
    """A kernel at a size; ``make`` needs triton if ``triton`` is set."""

    name: str
    case: str
    symbols: int
    make: Callable[[], Kernel]
    triton: bool = True


def rows(sizes: tuple[Size, ...]) -> Iterator[Row]:
    """All kernels: coder and quantizer at every size, the model's layers at the first."""
    for size in sizes:
        yield from coder_rows(size).values()
    yield from layer_rows(sizes[0])
    for size in sizes:
        yield nearest_row(size)


def coder_rows(size: Size) -> dict[str, Row]:
    """Kernel -> row, of what codes tokens once their logits are there."""
    makes: dict[str, Callable[[], Kernel]] = {
        "symbol_intervals": partial(intervals, size),
        "encode_kernel": partial(encode, size),
        "pack_kernel": partial(pack, size),
        "decode_kernel<true>": partial(decode, size, True),
        "decode_kernel<false>": partial(decode, size, False),
    }
    case = f"V = {size.config.codebook_size}"
    return {
        name: Row(name, case, size.symbols, make, name == "symbol_intervals")
        for name, make in makes.items()
    }


def layer_rows(size: Size) -> tuple[Row, ...]:
    """What a layer of the model and its head launch: for queries, attention for all entries.

    LayerNorm, the maps in the order of ``linear_maps``, attention.
    """
    config = size.config
    return (
        Row("layer_norm", f"d = {config.dim}", size.symbols, partial(norm, size)),
        *(
            Row(
                "linear",
                f"{name}, {terms} -> {outputs}, {end}",
                size.symbols,
                partial(linear, size, terms, outputs, end),
            )
            for name, terms, outputs, end in linear_maps(config)
        ),
        Row(
            "attention",
            f"{config.heads} heads of {config.head_dim}, {SCHEDULE}",
            size.symbols,
            partial(attention, size),
        ),
    )


def nearest_row(size: Size) -> Row:
    """The quantizer's search."""
    case = f"{size.config.codebook_size} codes of {LATENT}"
    return Row("nearest_codes", case, size.symbols, partial(nearest, size))


def linear_maps(config: TransformerConfig) -> tuple[tuple[str, int, int, str], ...]:
    """(name, inputs, outputs, end) of the linear maps of a layer, and of the head."""
    dim, inner = config.dim, config.inner
    return (
        ("q", dim, inner, "int8"),
        ("kv", dim, 2 * inner, "int8"),
        ("out", inner, dim, "residual"),
        ("up", dim, config.hidden, "table"),
        ("down", config.hidden, dim, "residual"),
        ("head", dim, config.codebook_size, "int16"),
    )


def _programs(source: Source, rows: int, name: str = "BLOCK_ROWS") -> int:
    return -(-rows // source.constants[name])


def interval_bytes(size: Size) -> tuple[int, int]:
    """What ``symbol_intervals`` moves, and the least that anything for this could.

    Of a symbol: V logits of 2 bytes; symbol, start and freq, here of 4 bytes each, at best of 2.
    """
    logits = 2 * size.config.codebook_size
    return size.symbols * (logits + 12), size.symbols * (logits + 6)


def intervals(size: Size) -> Kernel:
    """Logits int16 -> (start, freq): V lookups of a symbol."""
    codebook = size.config.codebook_size
    source = gpu_sources.symbol_intervals(codebook)
    return Kernel(
        _programs(source, size.symbols),
        source.warps,
        interval_bytes(size)[0],
        source,
        lookup_cycles=size.symbols * codebook / 32 * LOOKUP_CYCLES,
    )


def stream_bytes(size: Size) -> float:
    """Bytes of all streams where every symbol costs log2(V) bits, the most a good model needs."""
    return size.symbols * math.log2(size.config.codebook_size) / 8


def encode(size: Size) -> Kernel:
    """A warp for each stream: 8 bytes read for each symbol, the streams written."""
    groups = -(-size.tokens // 32)
    return Kernel(
        -(-size.images // 4),
        4,
        8 * size.symbols + stream_bytes(size),
        instructions=size.symbols * ENCODE_INSTRUCTIONS,
        chain_cycles=size.tokens * ENCODE_CYCLES + groups * ENCODE_GROUP_CYCLES,
    )


def pack(size: Size) -> Kernel:
    """A block for each stream: lengths of all before it, its own, and the copy, 1024 at a time."""
    own = stream_bytes(size) / size.images
    waits = -(-size.images // 256) + 1 + math.ceil(own / 1024)
    return Kernel(size.images, 8, 2 * stream_bytes(size), chain_cycles=waits * PACK_CYCLES)


def decode(size: Size, whole: bool) -> Kernel:
    """A warp for each stream, all stages together: logits, streams, symbols."""
    codebook = size.config.codebook_size
    blocks = -(-codebook // 256)
    base, each = DECODE_INSTRUCTIONS[whole]
    return Kernel(
        -(-size.images // 4),
        4,
        size.symbols * (2 * codebook + 4) + stream_bytes(size),
        instructions=size.symbols * (base + each * blocks),
        chain_cycles=size.tokens * (DECODE_CYCLES[0] + DECODE_CYCLES[1] * blocks),
    )


def norm(size: Size) -> Kernel:
    """int32 -> int8: 5 bytes of each number."""
    source = gpu_sources.layer_norm(size.config.dim)
    moved = 5 * size.config.dim * size.symbols
    return Kernel(_programs(source, size.symbols), source.warps, moved, source)


def linear(size: Size, terms: int, outputs: int, end: str) -> Kernel:
    """int8 products, of tiles, and what follows them."""
    source = gpu_sources.linear(size.symbols, terms, end)
    tiles = -(-outputs // source.constants["BLOCK_OUTPUTS"])
    written = {"int8": 1, "table": 1, "int16": 2, "residual": 8}[end]  # a residual is read, too
    return Kernel(
        _programs(source, size.symbols) * tiles,
        source.warps,
        size.symbols * (terms + outputs * written) + outputs * (terms + 9),
        source,
        tensor_ops=2 * size.symbols * terms * outputs,
    )


def attention(size: Size) -> Kernel:
    """All contents and queries of one pass; the plan tells how many keys a program looks at."""
    config = size.config
    source = gpu_sources.attention(config.head_dim)
    block, group = source.constants["BLOCK"], source.constants["GROUP"]
    readers, keys, blocks, listed = _reading(size.side, block, group)
    trips = listed / group / blocks
    return Kernel(
        blocks * config.heads * size.images,
        source.warps,
        size.images * config.inner * 2 * (readers + keys) + 12 * listed,
        source,
        trips=(trips, trips),
        tensor_ops=2 * 2 * size.images * config.inner * listed * block,
    )


@cache
def _reading(side: int, block: int, group: int) -> tuple[int, int, int, int]:
    """Readers, keys, blocks of readers and listed keys of one pass over a grid."""
    reading, keys = pass_entries(side)
    _, blocks, _, listed = plan_readers(reading, keys, torch.device("cpu"), block, group)
    return len(reading), len(keys), len(blocks), listed.shape[1]


def pass_entries(side: int) -> tuple[entries.Entries, entries.Entries]:
    """What reads in the pass that encodes a grid, and the keys: start entries and contents.

    The readers are the keys and then the queries of all tokens.
    """
    stages = schedule.stages(SCHEDULE, side, side)
    coding = schedule.order(stages)
    stage = stages.reshape(-1)[coding]
    known = int(np.searchsorted(stage, stage[-1]))
    contents = entries.content_entries(stage[:known], coding[:known], side)
    keys = entries.join(entries.start_entries(), contents)
    return entries.join(keys, entries.query_entries(stage, coding, side)), keys


def nearest(size: Size) -> Kernel:
    """Float32 vectors and codebook -> indices; a program walks through the whole codebook."""
    source = gpu_sources.nearest_codes()
    codes = size.config.codebook_size
    tiles = -(-codes // source.constants["BLOCK_K"])
    steps = -(-LATENT // source.constants["BLOCK_D"])
    return Kernel(
        _programs(source, size.symbols, "BLOCK_N"),
        source.warps,
        size.symbols * (4 * LATENT + 4) + 4 * LATENT * codes,
        source,
        trips=(tiles, tiles * steps),
    )
