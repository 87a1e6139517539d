"""Blocks of readers and keys in the form of percov2.triton_kernels.attention."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy.visibility import NEVER, Entries, split_readers

__all__ = ["plan_readers"]


_TILE = 8
"""Readers are split by place down to squares of this side. Their windows then overlap by 2/3."""


def _places(entries: Entries) -> NDArray[np.int32]:
    """Return row * 2^16 + column. Start entries get a distant row and their number as column."""
    start = entries.row < 0
    nowhere = (2**15 - 1) * 2**16 + np.arange(len(entries), dtype=np.int32)
    return np.where(start, nowhere, entries.row * np.int32(2**16) + entries.column)


def plan_readers(
    reader: Entries, key: Entries, device: torch.device, block: int, group: int
) -> tuple[torch.Tensor, ...]:
    """Return blocks of at most ``block`` readers and the keys that any of them may see.

    Start entries must come first in ``key``. The results are int32 tensors on ``device``, placed by
    one upload: reader_places [2, E] (place, reads), readers [blocks, block], first_keys
    [blocks + 1] and listed_keys [3, L] (index, place, key_stage). Blocks are padded with -1. Lists
    of keys are padded with hidden keys to multiples of ``group``. The split affects only the speed.
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
    return tuple(
        part[: array.size].view(array.shape) for part, array in zip(placed, arrays, strict=True)
    )
