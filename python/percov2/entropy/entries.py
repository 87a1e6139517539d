"""Entries of the token transformer and the rule of what sees what.

An entry = (position, payload, key_stage, reads). Key j is visible to entry i iff
``key_stage[j] <= reads[i]`` and j lies in the 31 x 31 window around i, or j is a start entry:

* start entries: (0, 0), three of them (constant, height class, width class), without a position,
  so no softmax is empty;
* the content of a token of stage g: (g, g);
* the query for a position of stage g: (NEVER, g - 1), never a key.

So what a visible key knows (contents of stages <= its own key_stage) is always a part of what the
reader may know. A schedule enters the model only through these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

NEVER = 2**31 - 1
"""key_stage of a query."""
RADIUS = 15
WINDOW = 2 * RADIUS + 1
START_ENTRIES = 3
SIZE_CLASSES = 17
SIXTEENTHS = 16

START_INDEX = WINDOW * WINDOW
"""First relative index of a start key; below are (dy + 15) * 31 + dx + 15."""
HIDDEN_INDEX = START_INDEX + START_ENTRIES
"""Relative index of a key that must not be seen."""

BLOCK_PAIRS = 2**17
"""A block holds at most about this many (query, key) pairs: scores of 4 heads fill 2 MB."""
KEPT_PAIRS = 2**24
"""Plans up to this many pairs keep their relative indices; larger ones compute them per layer."""
_TILE = 16

Places = TypeVar("Places", NDArray[np.int64], torch.Tensor)


@dataclass(frozen=True)
class Entries:
    """Where and when entries are: four int32 arrays [E]; start entries have position (-1, -1)."""

    row: NDArray[np.int32]
    column: NDArray[np.int32]
    key_stage: NDArray[np.int32]
    reads: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: NDArray[np.int64] | slice) -> Entries:
        """The entries at ``index``, in its order."""
        return Entries(
            self.row[index], self.column[index], self.key_stage[index], self.reads[index]
        )


def join(*parts: Entries) -> Entries:
    """The entries of all parts, one part after the other."""
    return Entries(
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.column for part in parts]),
        np.concatenate([part.key_stage for part in parts]),
        np.concatenate([part.reads for part in parts]),
    )


def start_entries() -> Entries:
    """The three start entries."""
    nowhere = np.full(START_ENTRIES, -1, dtype=np.int32)
    zero = np.zeros(START_ENTRIES, dtype=np.int32)
    return Entries(nowhere, nowhere, zero, zero)


def content_entries(stage: NDArray[np.int32], position: NDArray[np.int64], width: int) -> Entries:
    """Contents at raster ``position`` [n] with stages [n] in a grid of ``width`` columns."""
    row, column = np.divmod(position.astype(np.int32), np.int32(width))
    return Entries(row, column, stage, stage)


def query_entries(stage: NDArray[np.int32], position: NDArray[np.int64], width: int) -> Entries:
    """Queries for raster ``position`` [n] of stages [n] in a grid of ``width`` columns."""
    row, column = np.divmod(position.astype(np.int32), np.int32(width))
    return Entries(row, column, np.full_like(stage, NEVER), stage - np.int32(1))


def visible(reader: Entries, key: Entries) -> NDArray[np.bool_]:
    """The rule: bool [len(reader), len(key)]."""
    return relative_index(reader, key) != HIDDEN_INDEX


def relative_index(reader: Entries, key: Entries) -> NDArray[np.int16]:
    """Index of each pair into the table of relative positions.

    int16 [len(reader), len(key)]: (dy + 15) * 31 + dx + 15 with (dy, dx) = key - reader,
    START_INDEX + i for start key i, HIDDEN_INDEX for a key that the reader must not see. Start
    keys come first in ``key``, in their order.
    """
    readers = _columns(reader.row, reader.column, reader.reads)
    keys = _columns(key.row, key.column, key.key_stage)
    return _relative_index(readers, keys, int(np.count_nonzero(key.key_stage == 0))).numpy()


def _columns(*columns: NDArray[np.int32]) -> torch.Tensor:
    """Columns of entries, one below the other: int32 [len(columns), E]."""
    return torch.from_numpy(np.stack(columns))


def _relative_index(reader: torch.Tensor, key: torch.Tensor, starts: int) -> torch.Tensor:
    """``relative_index`` of int32 [3, nq] (row, column, reads) and [3, nk] (..., key_stage)."""
    place, other = reader[:2].to(torch.int16)[:, :, None], key[:2].to(torch.int16)[:, None]
    dy, dx = (other - place).unbind(0)
    seen = (dy.abs() <= RADIUS).logical_and_(dx.abs() <= RADIUS)
    seen.logical_and_(key[2] <= reader[2, :, None])
    index = dy.add_(RADIUS).mul_(WINDOW).add_(dx.add_(RADIUS))
    index.masked_fill_(seen.logical_not_(), HIDDEN_INDEX)
    index[:, :starts] = torch.arange(
        START_INDEX, START_INDEX + starts, dtype=torch.int16, device=index.device
    )
    return index


@dataclass(frozen=True)
class Block:
    """Queries that are computed together and the keys that any of them may see.

    readers: int64 [nq], indices of reading entries; keys: int64 [nk], indices of keys, start keys
    first; relative(): int64 [nq * nk], indices into the table of relative positions.
    """

    readers: torch.Tensor
    keys: torch.Tensor
    relative: Callable[[], torch.Tensor]


Part = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Indices of readers and of the keys that any of them may see, start keys first."""


def split_readers(
    reader: Entries, key: Entries, enough: Callable[[int, int], bool], tile: int = _TILE
) -> list[Part]:
    """Split readers until ``enough(number of readers, number of keys)`` or one reader is left.

    By place first; inside a square of ``tile`` x ``tile``, by what they may read.
    """
    parts: list[Part] = []
    everyone = np.arange(len(reader), dtype=np.int64)
    placed = reader.row >= 0
    if not placed.all():
        parts.append((everyone[~placed], np.flatnonzero(key.key_stage == 0)))
    stack = [(everyone[placed], np.arange(len(key), dtype=np.int64))] if placed.any() else []
    while stack:
        readers, keys = stack.pop()
        rows, columns = reader.row[readers], reader.column[readers]
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        near = key.row[keys], key.column[keys]
        keep = (near[0] >= top - RADIUS) & (near[0] <= bottom + RADIUS)
        keep &= (near[1] >= left - RADIUS) & (near[1] <= right + RADIUS)
        keep |= near[0] < 0
        keys = keys[keep & (key.key_stage[keys] <= reader.reads[readers].max())]
        if len(readers) == 1 or enough(len(readers), len(keys)):
            parts.append((readers, keys))
            continue
        high, wide = bottom - top, right - left
        if max(high, wide) >= tile:
            by = rows if high >= wide else columns
        else:
            by = reader.reads[readers]
        ranked = readers[np.argsort(by, kind="stable")]
        half = len(ranked) // 2
        stack += [(ranked[half:], keys), (ranked[:half], keys)]
    return parts


def plan_blocks(
    reader: Entries, key: Entries, device: torch.device | str = "cpu", pairs: int = BLOCK_PAIRS
) -> list[Block]:
    """Split readers into blocks that leave out most keys which nobody in the block may see.

    Neighbours share a window, so readers are split by place first (``split_readers``). ``key`` has
    its start entries first. The split changes speed only.
    """
    parts = split_readers(reader, key, lambda many, keys: many * keys <= pairs)
    return _blocks(reader, key, parts, torch.device(device))


def _blocks(
    reader: Entries,
    key: Entries,
    parts: list[Part],
    device: torch.device,
) -> list[Block]:
    """Blocks of (readers, keys), placed on a device by a single upload, however many they are."""
    columns = [reader.row, reader.column, reader.reads, key.row, key.column, key.key_stage]
    arrays: list[NDArray[Any]] = [*columns, *(array for part in parts for array in part)]
    joined = np.concatenate([array.astype(np.int32, copy=False) for array in arrays])
    placed = torch.from_numpy(joined).to(device, non_blocking=True)
    sizes = [len(array) for array in arrays]
    head, tail = placed.split([sum(sizes[:6]), sum(sizes[6:])])
    readers, keys = (side.view(3, -1) for side in head.split([3 * len(reader), 3 * len(key)]))
    starts = int(np.count_nonzero(key.key_stage == 0))
    indices = tail.to(torch.int64).split(sizes[6:])
    keep = sum(len(r) * len(k) for r, k in parts) <= KEPT_PAIRS
    return [
        _block(readers, keys, starts, mine, theirs, keep)
        for mine, theirs in zip(indices[::2], indices[1::2], strict=True)
    ]


def _block(
    reader: torch.Tensor,
    key: torch.Tensor,
    starts: int,
    readers: torch.Tensor,
    keys: torch.Tensor,
    keep: bool,
) -> Block:
    mine, theirs = reader.index_select(1, readers), key.index_select(1, keys)

    def relative() -> torch.Tensor:
        return _relative_index(mine, theirs, starts).flatten()

    if keep:
        kept = relative()
        return Block(readers, keys, lambda: kept.to(torch.int64))
    return Block(readers, keys, lambda: relative().to(torch.int64))


def sixteenth(position: Places, length: int) -> Places:
    """Which sixteenth of a side of ``length`` tokens each position 0 .. length - 1 lies in.

    An int64 array or a tensor on any device; the result is of the same kind and shape.
    """
    return position * SIXTEENTHS // length


def size_class(length: int) -> int:
    """Class of a side of ``length`` tokens: 0 for 1, then one per doubling, at most 16."""
    return min((length - 1).bit_length(), SIZE_CLASSES - 1)
