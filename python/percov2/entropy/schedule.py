"""Entropy schedules: the stage of every token position.

A schedule splits the ``height * width`` token positions of an image into stages 1..S; stage s is
coded given all earlier stages. Schedules are part of the file format, and
docs/reference/schedules.md is their normative definition. All results are integers, and golden
hashes in the tests freeze them for all machines.

PerCoV2 (arXiv 2503.09368, Table 1) compares checkerboard, quincunx, QLDS and implicit hierarchical
VAR. QLDS is a quantized low-discrepancy sequence: the R2 sequence of M. Roberts with power-law
group sizes. For grids whose sides are not one power of two, this package defines its own rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = [
    "DEFAULT_SCHEDULE",
    "MAX_POSITIONS",
    "SCHEDULES",
    "Schedule",
    "check_name",
    "integer_map",
    "nested_grids",
    "order",
    "qlds",
    "stage_count",
    "stage_map",
    "stages",
]


SCHEDULES: tuple[str, ...] = (
    "qlds12",
    "quincunx",
    "checkerboard",
    "var",
    "raster",
    "qlds8",
    "qlds5",
)
"""Schedule names. A file stores a schedule as its index in this tuple."""

DEFAULT_SCHEDULE = "qlds12"

MAX_POSITIONS = 2**24
"""Largest number of token positions of a grid (a 65,536 x 65,536 image at 16 pixels per token)."""

# The R2 sequence starts at 1/2 and advances by 1/g and 1/g^2, g = 1.32471795724474602596 (the
# plastic number). Wrapping 32-bit counters of fractions give every machine the same walk.
_COUNTER_START = 2**31
_ROW_STEP = 3242174889
_COLUMN_STEP = 2447445414

# The walk stops after this many steps per position (plus a constant). Positions not met by then
# follow in raster order. Grids of ordinary shape are covered much earlier.
_WALK_STEPS_PER_POSITION = 16
_WALK_EXTRA_STEPS = 64

_QLDS_STAGES = {"qlds12": 12, "qlds8": 8, "qlds5": 5}
_QLDS_POWER = Fraction(11, 5)

Schedule = str | np.ndarray
"""One of ``SCHEDULES``, or any stage map int32 [height, width]."""


def check_name(name: str) -> None:
    """Raise ValueError unless a schedule has that name. The message lists all schedules."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")


@lru_cache(maxsize=16, typed=True)  # 4.0 equals 4, but is refused
def stages(name: str, height: int, width: int) -> np.ndarray:
    """Return the stage of every position of a token grid.

    Args:
        name: one of ``SCHEDULES``.
        height: rows of the grid, in tokens, >= 1.
        width: columns of the grid, in tokens, >= 1.

    Returns:
        int32 [height, width], read-only, with values 1..S. Each of the S stages has at least one
        position.

    Raises:
        ValueError: an unknown name, a side that is no whole number, or a grid without positions or
            with more than ``MAX_POSITIONS``.

    >>> stages("quincunx", 3, 5)
    array([[1, 5, 3, 5, 1],
           [5, 4, 5, 4, 5],
           [3, 5, 2, 5, 3]], dtype=int32)
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    for which, side in (("height", height), ("width", width)):
        if not isinstance(side, int | np.integer) or isinstance(side, bool):
            raise ValueError(f"{which} is {side!r}; it must be a whole number of tokens")
    height, width = int(height), int(width)
    if height < 1 or width < 1:
        raise ValueError(f"a token grid needs height and width >= 1, got {height}x{width}")
    if height * width > MAX_POSITIONS:
        raise ValueError(
            f"a token grid of {height}x{width} has more than {MAX_POSITIONS} positions; "
            "split the picture into smaller ones"
        )
    if name in _QLDS_STAGES:
        result = qlds(height, width, _QLDS_STAGES[name])
    elif name == "quincunx":
        result = _dense(_quincunx(height, width))
    elif name == "checkerboard":
        result = _dense(_checkerboard(height, width))
    elif name == "var":
        doublings = range((max(height, width) - 1).bit_length() + 1)
        result = nested_grids(height, width, [1 << exponent for exponent in doublings])
    else:
        result = np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)
    result.setflags(write=False)
    return result


def integer_map(stage_map: Any) -> np.ndarray:
    """Return a stage map as an array. Raise ValueError unless it holds integers."""
    array = np.asarray(stage_map)
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"a schedule is a {type(stage_map).__name__} of {array.dtype}; give a schedule's name "
            "or a stage map of integers"
        )
    return array


def stage_map(schedule: Schedule, height: int, width: int) -> np.ndarray:
    """Return the stage map of a schedule's name, or the given stage map itself.

    Raises ValueError as ``stages`` does, or if the given stage map has another shape or dtype.
    """
    if isinstance(schedule, str):
        return stages(schedule, height, width)
    given = integer_map(schedule)
    if given.shape != (height, width):
        raise ValueError(f"a stage map of {given.shape} for a token grid of {height}x{width}")
    return given


def stage_count(name: str, height: int, width: int) -> int:
    """Return the number of stages of a grid. The arguments and errors are those of ``stages``."""
    return int(stages(name, height, width).max())


def order(stage_map: np.ndarray) -> np.ndarray:
    """Return the positions of a grid in coding order: by stage, and in raster order in each stage.

    Args:
        stage_map: integer [height, width], as ``stages`` returns it.

    Returns:
        int64 [height * width] raster indices.

    >>> order(stages("checkerboard", 2, 3))
    array([0, 2, 4, 1, 3, 5])
    """
    return np.argsort(stage_map.reshape(-1), kind="stable").astype(np.int64, copy=False)


def _dense(raw: np.ndarray) -> np.ndarray:
    """Relabel stage numbers >= 0 as 1..S without gaps, in the same order."""
    used = np.bincount(raw.reshape(-1)) > 0
    labels = np.cumsum(used, dtype=np.int32)
    return labels[raw]


def _checkerboard(height: int, width: int) -> np.ndarray:
    return 1 + (np.arange(height)[:, None] + np.arange(width)[None, :]) % 2


def _quincunx(height: int, width: int) -> np.ndarray:
    """Return the dyadic quincunx lattice, from the coarsest step (below the longer side) to 1.

    The steps are 2^k, ..., 2, 1. The multiples of 2^k in both directions come first. Each finer
    step t adds two stages: positions whose row and column are both odd multiples of t, then the
    remaining multiples of t.
    """
    coarsest = max((max(height, width) - 1).bit_length() - 1, 0)
    rows = np.arange(height)[:, None]
    columns = np.arange(width)[None, :]
    either = rows | columns | (1 << coarsest)
    step = either & -either  # the largest power of two, up to 2^k, that divides row and column
    exponent = np.log2(step.astype(np.float64)).astype(np.int64)  # exact: powers of two
    both_odd = ((rows & step) != 0) & ((columns & step) != 0)
    later = 1 + 2 * (coarsest - 1 - exponent) + np.where(both_odd, 1, 2)
    return np.where(exponent == coarsest, 1, later)


def nested_grids(height: int, width: int, sides: Iterable[int]) -> np.ndarray:
    """Return the stages, int32 [height, width], of sub-grids with growing sides.

    The sub-grid of side s holds the rows floor(i * height / s) and the columns floor(i * width / s)
    for 0 <= i < s. A position belongs to the first sub-grid that holds it. The last side must be at
    least ``max(height, width)``, so that every position belongs to one.
    """
    raw = np.zeros((height, width), dtype=np.int64)
    for stage, side in reversed(list(enumerate(sides))):
        i = np.arange(side)
        raw[np.ix_(np.unique(i * height // side), np.unique(i * width // side))] = stage
    return _dense(raw)


def qlds(height: int, width: int, stage_count: int, power: Fraction = _QLDS_POWER) -> np.ndarray:
    """Return the QLDS stages, int32 [height, width]: the R2 walk, cut into groups by a power law.

    With N positions and S = ``stage_count`` stages, group i ends at round(N * (i / S)^power). S
    must be at least 1.
    """
    positions = height * width
    walk = _qlds_walk(height, width)
    ends = _power_law_ends(positions, stage_count, power)
    labels = np.searchsorted(ends, np.arange(positions), side="right") + 1
    result = np.empty(positions, dtype=np.int32)
    result[walk] = labels
    return result.reshape(height, width)


def _qlds_walk(height: int, width: int) -> np.ndarray:
    """Return int64 [N]: raster indices in the order in which the R2 walk first meets them."""
    positions = height * width
    limit = _WALK_STEPS_PER_POSITION * positions + _WALK_EXTRA_STEPS
    seen = np.zeros(positions, dtype=bool)
    parts: list[np.ndarray] = []
    found = 0
    first = 1
    while found < positions and first <= limit:
        last = min(limit, first + max(positions, 256) - 1)
        n = np.arange(first, last + 1, dtype=np.uint64)
        met = _walk_positions(n, height, width)
        met = met[~seen[met]]
        _, where = np.unique(met, return_index=True)
        met = met[np.sort(where)]
        seen[met] = True
        parts.append(met)
        found += len(met)
        first = last + 1
    parts.append(np.flatnonzero(~seen))
    return np.concatenate(parts)


def _walk_positions(n: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return int64 raster indices of the walk's steps n (uint64)."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    row_counter = (np.uint64(_COUNTER_START) + n * np.uint64(_ROW_STEP)) & mask
    column_counter = (np.uint64(_COUNTER_START) + n * np.uint64(_COLUMN_STEP)) & mask
    row = (row_counter * np.uint64(height)) >> shift
    column = (column_counter * np.uint64(width)) >> shift
    return (row * np.uint64(width) + column).astype(np.int64)


def _power_law_ends(positions: int, stage_count: int, power: Fraction = _QLDS_POWER) -> np.ndarray:
    """Return int64 [S]: cumulative stage sizes round(N * (i / S)^power), strictly increasing.

    With power = p/q the rounded value (halves up) is the largest k with
    (2k - 1)^q * S^p <= 2^q * N^q * i^p. Plain integers avoid floating-point powers. S is at most
    the number of positions.
    """
    count = min(stage_count, positions)
    p, q = power.numerator, power.denominator
    ends: list[int] = []
    for i in range(1, count + 1):
        bound = (2 * positions) ** q * i**p
        low, high = 0, positions
        while low < high:
            middle = (low + high + 1) // 2
            if (2 * middle - 1) ** q * count**p <= bound:
                low = middle
            else:
                high = middle - 1
        ends.append(max(low, ends[-1] + 1 if ends else 1))
    return np.array(ends, dtype=np.int64)
