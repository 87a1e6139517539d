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
    dy = key.row.astype(np.int16) - reader.row.astype(np.int16)[:, None] + np.int16(RADIUS)
    dx = key.column.astype(np.int16) - reader.column.astype(np.int16)[:, None] + np.int16(RADIUS)
    # A negative difference becomes a large unsigned one: two comparisons instead of four.
    seen = (dy.view(np.uint16) < WINDOW) & (dx.view(np.uint16) < WINDOW)
    seen &= key.key_stage <= reader.reads[:, None]
    index = np.where(seen, dy * np.int16(WINDOW) + dx, np.int16(HIDDEN_INDEX))
    starts = int(np.count_nonzero(key.key_stage == 0))
    index[:, :starts] = START_INDEX + np.arange(starts, dtype=np.int16)
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


def plan_blocks(
    reader: Entries, key: Entries, device: torch.device | str = "cpu", pairs: int = BLOCK_PAIRS
) -> list[Block]:
    """Split readers into blocks that leave out most keys which nobody in the block may see.

    Neighbours share a window, so readers are split by place first; inside a tile of 16 x 16, by
    what they may read. ``key`` has its start entries first. The split changes speed only.
    """
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
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
        if len(readers) == 1 or len(readers) * len(keys) <= pairs:
            parts.append((readers, keys))
            continue
        high, wide = bottom - top, right - left
        if max(high, wide) >= _TILE:
            by = rows if high >= wide else columns
        else:
            by = reader.reads[readers]
        ranked = readers[np.argsort(by, kind="stable")]
        half = len(ranked) // 2
        stack += [(ranked[half:], keys), (ranked[:half], keys)]
    keep_indices = sum(len(r) * len(k) for r, k in parts) <= KEPT_PAIRS
    return [_block(reader, key, r, k, torch.device(device), keep_indices) for r, k in parts]


def _block(
    reader: Entries,
    key: Entries,
    readers: NDArray[np.int64],
    keys: NDArray[np.int64],
    device: torch.device,
    keep: bool,
) -> Block:
    mine, theirs = reader.take(readers), key.take(keys)

    def relative() -> torch.Tensor:
        return torch.from_numpy(relative_index(mine, theirs).reshape(-1)).to(device)

    if keep:
        kept = relative()
        return Block(_index(readers, device), _index(keys, device), lambda: kept.to(torch.int64))
    return Block(_index(readers, device), _index(keys, device), lambda: relative().to(torch.int64))


def _index(values: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)


def sixteenths(length: int) -> NDArray[np.int64]:
    """Which sixteenth of the side each of ``length`` positions lies in: int64 [length]."""
    return np.arange(length, dtype=np.int64) * SIXTEENTHS // length


def size_class(length: int) -> int:
    """Class of a side of ``length`` tokens: 0 for 1, then one per doubling, at most 16."""
    return min((length - 1).bit_length(), SIZE_CLASSES - 1)
