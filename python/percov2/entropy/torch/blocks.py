"""Blocks of readers and the keys that they may see, as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy.visibility import (
    HIDDEN_INDEX,
    RADIUS,
    START_INDEX,
    WINDOW,
    Entries,
    Part,
    split_readers,
)

__all__ = ["KEPT_PAIRS", "Block", "plan_blocks"]


_BLOCK_PAIRS = 2**17
"""Target number of (query, key) pairs per block: the scores of 4 heads then fill 2 MB."""
KEPT_PAIRS = 2**24
"""Plans up to this many pairs keep their relative indices; larger plans compute them per layer."""


@dataclass(frozen=True)
class Block:
    """A group of readers and the keys that any of them may see.

    Attributes:
        readers: int64 [nq], indices of the reading entries.
        keys: int64 [nk], indices of the keys, start keys first.
        relative: a function that returns the indices into the table of relative positions, int64
            [nq * nk].
    """

    readers: torch.Tensor
    keys: torch.Tensor
    relative: Callable[[], torch.Tensor]


def plan_blocks(
    reader: Entries, key: Entries, device: torch.device | str = "cpu", pairs: int = _BLOCK_PAIRS
) -> list[Block]:
    """Split readers into blocks that omit most keys hidden from the whole block.

    Start entries must come first in ``key``. The split affects only the speed.
    """
    parts = split_readers(reader, key, lambda many, keys: many * keys <= pairs)
    return _blocks(reader, key, parts, torch.device(device))


def _blocks(
    reader: Entries,
    key: Entries,
    parts: list[Part],
    device: torch.device,
) -> list[Block]:
    """Return blocks of (readers, keys), placed on a device by a single upload."""
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


def _relative_index(reader: torch.Tensor, key: torch.Tensor, starts: int) -> torch.Tensor:
    """Return ``visibility.relative_index`` of int32 [3, nq] (row, column, reads) and [3, nk].

    The last row of ``key`` is its key_stage.
    """
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
