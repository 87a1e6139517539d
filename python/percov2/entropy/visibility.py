"""Entries of the token transformer and the visibility rule.

An entry is (position, payload, key_stage, reads). Entry i sees key j if j is a start entry, or if
``key_stage[j] <= reads[i]`` and j lies in the 31 x 31 window around i. Pairs (key_stage, reads):

* start entries: (0, 0). The three of them (constant, height class, width class) have no position
  and keep every softmax from being empty.
* the content of a token of stage g: (g, g).
* the query for a position of stage g: (NEVER, g - 1). It is never a key.

A visible key depends only on contents of stages <= its own key_stage, so a reader learns nothing
that it must not know. A schedule enters the model only through these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HIDDEN_INDEX",
    "NEVER",
    "RADIUS",
    "SIXTEENTHS",
    "SIZE_CLASSES",
    "START_ENTRIES",
    "START_INDEX",
    "WINDOW",
    "Entries",
    "Part",
    "content_entries",
    "join",
    "query_entries",
    "relative_index",
    "sixteenth",
    "size_class",
    "split_readers",
    "start_entries",
    "visible",
]


NEVER = 2**31 - 1
"""key_stage of a query."""
RADIUS = 15
WINDOW = 2 * RADIUS + 1
START_ENTRIES = 3
SIZE_CLASSES = 17
SIXTEENTHS = 16

START_INDEX = WINDOW * WINDOW
"""First relative index of a start key. The lower indices are (dy + 15) * 31 + dx + 15."""
HIDDEN_INDEX = START_INDEX + START_ENTRIES
"""Relative index of a key that must not be seen."""

_TILE = 16


@dataclass(frozen=True)
class Entries:
    """Positions and stages of entries, int32 arrays [E]. Start entries have position (-1, -1)."""

    row: NDArray[np.int32]
    column: NDArray[np.int32]
    key_stage: NDArray[np.int32]
    reads: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: NDArray[np.int64] | slice) -> Entries:
        """Return the entries at ``index``."""
        return Entries(
            self.row[index], self.column[index], self.key_stage[index], self.reads[index]
        )


def join(*parts: Entries) -> Entries:
    """Return the entries of all parts, one part after the other."""
    return Entries(
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.column for part in parts]),
        np.concatenate([part.key_stage for part in parts]),
        np.concatenate([part.reads for part in parts]),
    )


def start_entries() -> Entries:
    """Return the three start entries."""
    nowhere = np.full(START_ENTRIES, -1, dtype=np.int32)
    zero = np.zeros(START_ENTRIES, dtype=np.int32)
    return Entries(nowhere, nowhere, zero, zero)


def content_entries(stage: NDArray[np.int32], position: NDArray[np.int64], width: int) -> Entries:
    """Return the content entries of tokens in a grid of ``width`` columns.

    ``position`` [n] are their raster indices, and ``stage`` [n] their stages.
    """
    row, column = np.divmod(position.astype(np.int32), np.int32(width))
    return Entries(row, column, stage, stage)


def query_entries(stage: NDArray[np.int32], position: NDArray[np.int64], width: int) -> Entries:
    """Return the query entries for positions in a grid of ``width`` columns.

    ``position`` [n] are raster indices, and ``stage`` [n] are the stages of these positions.
    """
    row, column = np.divmod(position.astype(np.int32), np.int32(width))
    return Entries(row, column, np.full_like(stage, NEVER), stage - np.int32(1))


def visible(reader: Entries, key: Entries) -> NDArray[np.bool_]:
    """Return bool [len(reader), len(key)], True where the reader sees the key."""
    return relative_index(reader, key) != HIDDEN_INDEX


def relative_index(reader: Entries, key: Entries) -> NDArray[np.int16]:
    """Return the index of each pair into the table of relative positions.

    Start keys must come first in ``key``.

    Returns:
        int16 [len(reader), len(key)]. An element is (dy + 15) * 31 + dx + 15 with
        (dy, dx) = key - reader, START_INDEX + i for start key i, or HIDDEN_INDEX for a key that the
        reader must not see.
    """
    dy, dx = (
        other[None].astype(np.int32) - own[:, None]
        for own, other in ((reader.row, key.row), (reader.column, key.column))
    )
    seen = (np.abs(dy) <= RADIUS) & (np.abs(dx) <= RADIUS)
    seen &= key.key_stage[None] <= reader.reads[:, None]
    index = np.where(seen, (dy + RADIUS) * WINDOW + dx + RADIUS, HIDDEN_INDEX).astype(np.int16)
    starts = int(np.count_nonzero(key.key_stage == 0))
    index[:, :starts] = np.arange(START_INDEX, START_INDEX + starts)
    return index


Part = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Indices of readers, and indices of the keys that any of them may see, start keys first."""


def split_readers(
    reader: Entries, key: Entries, enough: Callable[[int, int], bool], tile: int = _TILE
) -> list[Part]:
    """Split readers into parts until each is small enough or has one reader.

    ``enough(number of readers, number of keys)`` returns True for a part that is small enough. The
    function splits by place down to squares of ``tile`` x ``tile``, then by ``reads``.
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


def sixteenth(position: Any, length: int) -> Any:
    """Return the sixteenth of a side of ``length`` tokens that holds each position.

    The positions, 0 .. length - 1, are an int64 array or a tensor. The result has the same type and
    shape.
    """
    return position * SIXTEENTHS // length


def size_class(length: int) -> int:
    """Return the class of a side of ``length`` tokens: log2(length), rounded up, at most 16."""
    return min((length - 1).bit_length(), SIZE_CLASSES - 1)
