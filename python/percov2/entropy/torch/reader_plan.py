"""Blocks of readers and keys for percov2.triton_kernels.attention."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy.visibility import NEVER, Entries, split_readers

__all__ = ["Blocks", "plan_readers"]


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
    parts = [
        (readers[first : first + block], keys)  # all start entries are one part
        for readers, keys in split_readers(reader, key, lambda many, _: many <= block, _TILE)
        for first in range(0, len(readers), block)
    ]
    readers = np.full((len(parts), block), -1, dtype=np.int32)
    lengths = [-(-len(keys) // group) * group for _, keys in parts]
    first_keys = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if first_keys[-1] >= 2**30:  # the kernel's offsets of 32 bits reach twice as far
        raise ValueError(
            f"{len(reader)} entries read {first_keys[-1]} keys in blocks; that must be below 2^30"
        )
    listed = np.zeros((3, first_keys[-1]), dtype=np.int32)
    listed[2] = NEVER
    places = _places(key)
    for i, (mine, theirs) in enumerate(parts):
        readers[i, : len(mine)] = mine
        end = first_keys[i] + len(theirs)
        listed[:, first_keys[i] : end] = theirs, places[theirs], key.key_stage[theirs]
    arrays = [np.stack([_places(reader), reader.reads]), readers, first_keys, listed]
    # Each array begins at a multiple of 16 bytes: kernels load the lists in wide pieces.
    sizes = [-(-array.size // 4) * 4 for array in arrays]
    joined = np.zeros(sum(sizes), dtype=np.int32)
    for array, end in zip(arrays, np.cumsum(sizes), strict=True):
        begin = end - (-(-array.size // 4) * 4)
        joined[begin : begin + array.size] = array.reshape(-1)
    placed = torch.from_numpy(joined).to(device, non_blocking=True).split(sizes)
    whole, all_readers, all_first, all_listed = (
        part[: array.size].view(array.shape) for part, array in zip(placed, arrays, strict=True)
    )
    result, begin = [], 0
    while begin < len(parts):
        end = int(np.searchsorted(first_keys, first_keys[begin] + most, side="right")) - 1
        end = max(end, begin + 1)
        result.append(
            Blocks(
                whole,
                all_readers[begin:end],
                all_first[begin : end + 1],
                all_listed,
                int(first_keys[end] - first_keys[begin]),
            )
        )
        begin = end
    return result
