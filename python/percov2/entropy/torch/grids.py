"""Token grids that pass the integer transformer together, and the order of their entries.

The grids may differ in size and schedule. The entries of all grids form one sequence: first the
start entries and contents, which are the keys, then the queries. Contents and queries are in *joint
order*: by stage, then by grid, then in raster order. In each stage, grids whose tokens a file holds
come before grids whose tokens are drawn. A pass over one stage therefore takes adjacent entries.
For a single grid the joint order is the coding order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy.schedule import order
from percov2.entropy.visibility import (
    SIXTEENTHS,
    START_ENTRIES,
    Entries,
    content_entries,
    join,
    query_entries,
    sixteenth,
    size_class,
    start_entries,
)

__all__ = ["Grid", "Grids", "PassMaps", "PlacedGrids"]

_BITS = (SIXTEENTHS - 1).bit_length()

Index = slice | Tensor
"""Adjacent elements, or the indices of any elements, int64 [n]."""


class Grid:
    """The entries of one grid, whose contents and queries are in coding order.

    Args:
        stages: int32 [h, w] with values 1 .. S.

    Attributes:
        name: a key that is equal for equal stage maps.
        ends: int64 [S + 1], the number of tokens of the first g stages.
        coding: int64 [N], raster indices in coding order.
        stage: int32 [N], their stages.
        keys: start entries and contents. No entry reads the contents of the last stage.
        queries: the queries of all tokens.
        places: int64 [2, N], the sixteenths of both sides that hold each token.
        kept: what an executor keeps for this grid.
    """

    def __init__(self, stages: NDArray[np.int32]) -> None:
        height, width = self.shape = stages.shape
        self.name: Hashable = self.name_of(stages)
        self.coding = order(stages)
        self.stage = stages.reshape(-1)[self.coding]
        count = int(self.stage[-1])
        self.ends = np.searchsorted(self.stage, np.arange(count + 1), side="right")
        known = int(self.ends[-2])
        contents = content_entries(self.stage[:known], self.coding[:known], width)
        self.keys = join(start_entries(), contents)
        self.queries = query_entries(self.stage, self.coding, width)
        row, column = np.divmod(self.coding, width)
        self.places = np.stack([sixteenth(row, height), sixteenth(column, width)])
        self.kept: dict[Hashable, Any] = {}

    @staticmethod
    def name_of(stages: NDArray[np.int32]) -> Hashable:
        """Return the name of the grid of a stage map."""
        return stages.shape, stages.tobytes()

    @property
    def stage_count(self) -> int:
        """Return the number of stages S."""
        return len(self.ends) - 1

    def parts(self, stage: int | None) -> tuple[slice, slice]:
        """Return the keys that appear in a pass, and its queries.

        ``stage`` is counted from 0. Its pass begins with the start entries, or with the contents of
        the stage before. None means the pass over all stages.
        """
        if stage is None:
            return slice(0, len(self.keys)), slice(0, len(self.queries))
        asked = slice(int(self.ends[stage]), int(self.ends[stage + 1]))
        if not stage:
            return slice(0, START_ENTRIES), asked
        begin, end = (START_ENTRIES + int(self.ends[stage - i]) for i in (1, 0))
        return slice(begin, end), asked

    def entries(self, stage: int | None, contents: bool) -> tuple[Entries, Entries]:
        """Return the readers and keys of a pass. Readers are the queries, after new contents."""
        fresh, asked = self.parts(stage)
        reader = self.queries.take(asked)
        if contents:
            reader = join(self.keys.take(fresh), reader)
        return reader, self.keys.take(slice(0, fresh.stop))


class PassMaps(NamedTuple):
    """The places of the entries of a pass.

    Attributes:
        grids: the grids that have entries in the pass.
        readers: int64 [R], the row of each reader in the pass. The readers of a grid are adjacent,
            as in ``Grid.entries``.
        keys: int64 [K], the index of each key among those of all grids, likewise.
    """

    grids: list[Grid]
    readers: NDArray[np.int64]
    keys: NDArray[np.int64]


class Grids:
    """The joint order of grids.

    Args:
        grids: the grids.
        sent: last stage of each grid whose tokens a file holds. None means all stages.

    Attributes:
        grids: the grids.
        sent: int64 [G], the number of stages that files hold.
        ends: int64 [S + 1], the number of tokens of the first g stages of all grids.
        key_ends: int64 [S], the number of start entries and of contents of the first g stages.
        query_at: int64 [N], places in the joint order, grid by grid in coding order.
    """

    def __init__(self, grids: Sequence[Grid], sent: Sequence[int] | None = None) -> None:
        self.grids = tuple(grids)
        self.sent = np.array([g.stage_count for g in grids] if sent is None else sent, np.int64)
        self.sizes = np.array([len(grid.coding) for grid in grids], dtype=np.int64)
        stage = np.concatenate([grid.stage for grid in grids])
        last = np.array([grid.stage_count for grid in grids], dtype=np.int32)
        drawn = stage > np.repeat(self.sent, self.sizes)
        self._by_stage = np.lexsort((drawn, stage))
        self.query_at = np.empty_like(self._by_stage)
        self.query_at[self._by_stage] = np.arange(len(stage))
        is_key = (stage < np.repeat(last, self.sizes))[self._by_stage]
        self._known = np.flatnonzero(is_key)  # places of the contents in the joint order
        starts = START_ENTRIES * len(self.grids)
        self._content_at = starts - 1 + np.cumsum(is_key)[self.query_at]
        self.ends = np.bincount(stage).cumsum()
        ordered = stage[self._by_stage][self._known]
        self.key_ends = starts + np.bincount(ordered, minlength=int(last.max())).cumsum()
        self._bases = np.concatenate([[0], np.cumsum(self.sizes)])

    @property
    def stage_count(self) -> int:
        """Return the largest number of stages of a grid."""
        return len(self.ends) - 1

    @property
    def key_count(self) -> int:
        """Return the number of keys."""
        return int(self.key_ends[-1])

    def parts(self, stage: int | None) -> tuple[slice, slice]:
        """Return the keys that appear in a pass, and its queries, as ``Grid.parts``."""
        if stage is None:
            return slice(0, self.key_count), slice(0, int(self.ends[-1]))
        begin = int(self.key_ends[stage - 1]) if stage else 0
        asked = slice(int(self.ends[stage]), int(self.ends[stage + 1]))
        return slice(begin, int(self.key_ends[stage])), asked

    def maps(self, stage: int | None, contents: bool) -> PassMaps:
        """Return the places of the entries of a pass; the arguments are those of ``entries``."""
        fresh, asked = self.parts(stage)
        first_query = asked.start - contents * (fresh.stop - fresh.start)
        present: list[Grid] = []
        readers: list[NDArray[np.int64]] = []
        keys: list[NDArray[np.int64]] = []
        for i, grid in enumerate(self.grids):
            if stage is not None and stage >= grid.stage_count:
                continue
            present.append(grid)
            mine, queries = grid.parts(stage)
            begin = int(self._bases[i])
            starts = np.arange(START_ENTRIES * i, START_ENTRIES * (i + 1))
            content = self._content_at[begin : begin + mine.stop - START_ENTRIES]
            every = np.concatenate([starts, content])
            keys.append(every)
            if contents:
                readers.append(every[mine] - fresh.start)
            places = self.query_at[begin + queries.start : begin + queries.stop]
            readers.append(places - first_query)
        return PassMaps(present, np.concatenate(readers), np.concatenate(keys))

    def rows(self) -> NDArray[np.int64]:
        """Return int64 [S, G + 1]: in stage g, grid i has the rows from [g, i] up to [g, i + 1].

        These are the rows of tokens that files hold. They come first in the stage.
        """
        counts = np.zeros((self.stage_count, len(self.grids) + 1), dtype=np.int64)
        for i, (grid, sent) in enumerate(zip(self.grids, self.sent, strict=True)):
            counts[:sent, i + 1] = np.diff(grid.ends)[:sent]
        return counts.cumsum(1)

    def drawn(self, stage: int) -> list[tuple[int, NDArray[np.int64]]]:
        """Return the grids whose tokens of a stage are drawn, with raster indices of the tokens."""
        return [
            (i, grid.coding[grid.parts(stage)[1]])
            for i, (grid, sent) in enumerate(zip(self.grids, self.sent, strict=True))
            if sent <= stage < grid.stage_count
        ]

    def of_each(self, flat: Any) -> list[Any]:
        """Return the parts [h, w] of an array or tensor [N], grid by grid in raster order."""
        bounds = zip(self._bases[:-1], self._bases[1:], self.grids, strict=True)
        return [flat[begin:end].reshape(grid.shape) for begin, end, grid in bounds]

    @cached_property
    def _host(self) -> list[NDArray[np.int64]]:
        base = np.repeat(self._bases[:-1], self.sizes)
        coding = np.concatenate([grid.coding for grid in self.grids]) + base
        # One number per token keeps the upload small.
        row, column = np.concatenate([grid.places for grid in self.grids], axis=1)
        tokens = (coding * SIXTEENTHS + row) * SIXTEENTHS + column
        classes = [[size_class(side) for side in grid.shape] for grid in self.grids]
        arrays = [tokens[self._by_stage], np.array(classes).T.ravel()]
        return arrays if len(self.grids) == 1 else [*arrays, self._known, self._pass_order()]

    def _pass_order(self) -> NDArray[np.int64]:
        """Return the places of contents and queries in the order of the passes over stages."""
        starts = START_ENTRIES * len(self.grids)
        parts = []
        for stage in range(self.stage_count):
            fresh, asked = self.parts(stage)
            if stage:
                parts.append(self._known[fresh.start - starts : fresh.stop - starts])
            parts.append(np.arange(asked.start, asked.stop))
        return np.concatenate(parts)

    def place(self, device: torch.device) -> PlacedGrids:
        """Return the tensors of the grids on a device, made by a single upload."""
        joined = torch.from_numpy(np.concatenate(self._host)).to(device, non_blocking=True)
        tokens, classes, *others = joined.split([len(array) for array in self._host])
        rows = tokens >> _BITS
        places = torch.stack([rows, tokens]) & (SIXTEENTHS - 1)
        return PlacedGrids(self, rows >> _BITS, places, classes.view(2, -1), *others)


class PlacedGrids(NamedTuple):
    """The tensors of grids on a device.

    Attributes:
        grids: the grids.
        sequence: int64 [N], the raster index of each token in joint order.
        places: int64 [2, N], the sixteenths of both sides that hold the token.
        classes: int64 [2, G], the size classes of heights and widths.
        known: int64, places of the contents; None for one grid, where they come first.
        passes: int64, places of contents and queries, pass by pass; None for one grid.
    """

    grids: Grids
    sequence: Tensor
    places: Tensor
    classes: Tensor
    known: Tensor | None = None
    passes: Tensor | None = None

    def contents(self, stage: int | None) -> Index:
        """Return the places of the contents that appear in a pass, in joint order."""
        part = self._known(stage)
        return part if self.known is None else self.known[part]

    def _known(self, stage: int | None) -> slice:
        starts, fresh = START_ENTRIES * len(self.grids.grids), self.grids.parts(stage)[0]
        return slice(max(fresh.start - starts, 0), fresh.stop - starts)

    def entries(self, stage: int) -> Index:
        """Return the places of the contents and queries of a stage's pass."""
        known, asked = self._known(stage), self.grids.parts(stage)[1]
        if self.passes is None:
            return slice(known.start, asked.stop)
        begin, end = (known.start + asked.start, known.stop + asked.stop)
        return self.passes[begin:end]
