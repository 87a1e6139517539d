"""Explicit hierarchical VAR (arXiv 2404.02905): the token grids of several scales of one picture.

A picture of h x w tokens has scales of h / 2^k x w / 2^k tokens, rounded up, from 1 x 1 to h x w.
Its tokens are listed scale after scale, each in raster order. Scale g is coded in stage g. Its
entries see each other and the entries of all coarser scales. An entry's payload is the token in
scale g - 1 that covers it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from percov2.entropy.torch.direct import DirectPlan
from percov2.entropy.visibility import Entries

__all__ = ["scale_plan", "scale_shapes"]


def scale_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Return the number of rows and columns of every scale, the coarsest first.

    >>> scale_shapes(8, 5)
    [(1, 1), (2, 2), (4, 3), (8, 5)]
    """
    halvings = (max(height, width) - 1).bit_length()
    return [(-(-height >> k), -(-width >> k)) for k in range(halvings, -1, -1)]


@lru_cache(maxsize=256)
def scale_plan(height: int, width: int, codebook_size: int) -> DirectPlan:
    """Return the coding plan of all scales. Each scale has its own ``codebook_size`` tokens.

    An entry's position is the middle of its cell in the finest grid.
    """
    rows, columns, stage, source = [], [], [], []
    coarser, begin = (0, 0), 0
    for number, (down, across) in enumerate(scale_shapes(height, width), 1):
        y, x = np.divmod(np.arange(down * across), across)
        rows.append((2 * y + 1) * height // (2 * down))
        columns.append((2 * x + 1) * width // (2 * across))
        stage.append(np.full(len(y), number))
        over = y * coarser[0] // down * coarser[1] + x * coarser[1] // across
        source.append(begin + over if number > 1 else np.full(len(y), -1))
        begin += coarser[0] * coarser[1]
        coarser = down, across
    stages = np.concatenate(stage).astype(np.int32)
    entries = Entries(
        np.concatenate(rows).astype(np.int32),
        np.concatenate(columns).astype(np.int32),
        stages,
        stages,
    )
    first = (stages.astype(np.int64) - 1) * codebook_size
    return DirectPlan(entries, stages.astype(np.int64), np.concatenate(source), first)
