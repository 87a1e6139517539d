"""Blocks of readers and keys for percov2.triton_kernels.attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy.visibility import NEVER, Entries, split_readers

__all__ = ["Blocks", "HostBlocks", "key_table", "place_blocks", "plan_readers", "split_blocks"]


_TILE = 8
"""Readers are split by place down to squares of this side. Their windows then overlap by 2/3."""


def _places(entries: Entries) -> NDArray[np.int32]:
    """Return row * 2^16 + column. Start entries get a distant row and their number as column."""
    start = entries.row < 0
    nowhere = (2**15 - 1) * 2**16 + np.arange(len(entries), dtype=np.int32)
    return np.where(start, nowhere, entries.row * np.int32(2**16) + entries.column)


class Blocks(NamedTuple):
    """Blocks of readers in the form of percov2.triton_kernels.Plan, which describes the parts."""

    reader_places: torch.Tensor
    readers: torch.Tensor
    first_keys: torch.Tensor
    listed_keys: torch.Tensor
    size: int


class HostBlocks(NamedTuple):
    """The blocks of the readers of one grid, on the host.

    Attributes:
        readers: int32 [blocks, block], indices of readers, padded with -1.
        lengths: int64 [blocks], numbers of listed keys, which are multiples of ``group``.
        keys: int32, indices of the listed keys of all blocks, with -1 for a hidden key.
        reader_table: int32 [2, R], places of the readers and what they may read.
        key_table: int32 [2, K], places and stages of the keys.
    """

    readers: NDArray[np.int32]
    lengths: NDArray[np.int64]
    keys: NDArray[np.int32]
    reader_table: NDArray[np.int32]
    key_table: NDArray[np.int32]


def key_table(key: Entries) -> NDArray[np.int32]:
    """Return places and stages of keys, int32 [2, K]."""
    return np.stack([_places(key), key.key_stage])


def split_blocks(reader: Entries, key: Entries, block: int, group: int) -> HostBlocks:
    """Split readers into blocks. The arguments are those of ``plan_readers``."""
    parts = [
        (readers[first : first + block], keys)  # all start entries are one part
        for readers, keys in split_readers(reader, key, lambda many, _: many <= block, _TILE)
        for first in range(0, len(readers), block)
    ]
    readers = np.full((len(parts), block), -1, dtype=np.int32)
    lengths = np.array([-(-len(keys) // group) * group for _, keys in parts], dtype=np.int64)
    listed = np.full(int(lengths.sum()), -1, dtype=np.int32)
    begins = np.cumsum(lengths) - lengths
    for row, begin, (mine, theirs) in zip(readers, begins, parts, strict=True):
        row[: len(mine)] = mine
        listed[begin : begin + len(theirs)] = theirs
    return HostBlocks(
        readers,
        lengths,
        listed,
        np.stack([_places(reader), reader.reads]),
        key_table(key),
    )


def _shifted(
    arrays: Sequence[NDArray[np.int32]], counts: Sequence[int], absent: int
) -> NDArray[np.int32]:
    """Return arrays of indices as one array of indices into joined tables of ``counts`` elements.

    Negative indices become ``absent``.
    """
    joined = np.concatenate(arrays)
    hidden = joined < 0
    if len(arrays) > 1:
        bases = (np.cumsum(counts) - counts).astype(np.int32)
        shifts = np.repeat(bases, [len(array) for array in arrays])
        joined += shifts.reshape(-1, *[1] * (joined.ndim - 1))
    joined[hidden] = absent
    return joined


def place_blocks(
    parts: Sequence[HostBlocks],
    reader_at: NDArray[np.int64] | None,
    key_at: NDArray[np.int64] | None,
    device: torch.device,
    most: int = 2**30,
) -> list[Blocks]:
    """Return the blocks of several grids, placed on ``device`` by one upload.

    Args:
        parts: the blocks of each grid.
        reader_at: the index of each reader in the pass, grid by grid. None means in order.
        key_at: the index of each key, likewise.
        device, most: as for ``plan_readers``.

    Raises:
        ValueError: the blocks list 2^30 keys or more.
    """
    own = np.concatenate([part.reader_table for part in parts], axis=1)
    known = np.concatenate([part.key_table for part in parts], axis=1)
    readers = _shifted([p.readers for p in parts], [p.reader_table.shape[1] for p in parts], -1)
    if reader_at is not None:
        readers = np.append(reader_at, -1).astype(np.int32)[readers]
        ordered = np.empty_like(own)
        ordered[:, reader_at] = own
        own = ordered
    first_keys = np.concatenate([[0], np.cumsum(np.concatenate([p.lengths for p in parts]))])
    if first_keys[-1] >= 2**30:  # the kernel's offsets of 32 bits reach twice as far
        raise ValueError(
            f"{own.shape[1]} entries read {first_keys[-1]} keys in blocks; that must be below 2^30"
        )
    count = known.shape[1]
    keys = _shifted([p.keys for p in parts], [p.key_table.shape[1] for p in parts], count)
    table = np.zeros((3, count + 1), dtype=np.int32)
    table[0, :count] = np.arange(count) if key_at is None else key_at
    table[1:, :count], table[2, count] = known, NEVER
    arrays = [own, readers, first_keys, table, keys]
    # Each array begins at a multiple of 16 bytes: kernels load the lists in wide pieces.
    sizes = [-(-array.size // 4) * 4 for array in arrays]
    joined = np.zeros(sum(sizes), dtype=np.int32)
    for array, end in zip(arrays, np.cumsum(sizes), strict=True):
        begin = end - (-(-array.size // 4) * 4)
        joined[begin : begin + array.size] = array.reshape(-1)
    placed = torch.from_numpy(joined).to(device, non_blocking=True).split(sizes)
    whole, all_readers, all_first, all_table, all_keys = (
        part[: array.size].view(array.shape) for part, array in zip(placed, arrays, strict=True)
    )
    listed = all_table.index_select(1, all_keys)
    result, begin = [], 0
    while begin < len(readers):
        end = int(np.searchsorted(first_keys, first_keys[begin] + most, side="right")) - 1
        end = max(end, begin + 1)
        size = int(first_keys[end] - first_keys[begin])
        result.append(
            Blocks(whole, all_readers[begin:end], all_first[begin : end + 1], listed, size)
        )
        begin = end
    return result


def plan_readers(
    reader: Entries,
    key: Entries,
    device: torch.device,
    block: int,
    group: int,
    most: int = 2**30,
) -> list[Blocks]:
    """Return blocks of at most ``block`` readers and the keys that any of them may see.

    Start entries must come first in ``key``. The tensors are placed on ``device`` by one upload.
    Blocks are padded with -1. Lists of keys are padded with hidden keys to multiples of ``group``.
    Consecutive blocks are together, as long as they list no more than ``most`` keys. The split
    affects only the speed.

    Raises:
        ValueError: the blocks list 2^30 keys or more.
    """
    return place_blocks([split_blocks(reader, key, block, group)], None, None, device, most)
