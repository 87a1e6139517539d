"""Files of bounded length, at a coarser rate where a reader would refuse a part of the stages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from percov2.container import tokens_file
from percov2.container.tokens_file import TooFewBytes
from percov2.models.config import Rate


class CoarserRateWarning(UserWarning):
    """A file has a coarser rate than the one that was asked for."""


def encode_bounded(
    encode: Callable[[Rate, Sequence[int]], list[bytes]],
    sizes: Sequence[tuple[int, int]],
    rates: Sequence[Rate],
    schedule: int,
) -> list[bytes]:
    """Encode pictures at the first rate, or at a later one where that is the only way.

    A picture of so many tokens that a reader accepts no part of them (docs/reference/bitstream.md,
    section 7) takes the first rate of which it has a file that is short enough.

    Args:
        encode: makes files of a rate and the numbers of some pictures; raises ``TooFewBytes``.
        sizes: (height, width) of every picture in pixels.
        rates: the wanted one, then coarser ones.
        schedule: its index.

    Raises:
        TooFewBytes: a picture that has no such file.

    Warns:
        CoarserRateWarning: a picture has another rate than the first.
    """
    wanted = rates[0]
    grids = [tokens_file.token_grid(size, wanted.token_side) for size in sizes]
    large = [i for i, grid in enumerate(grids) if tokens_file.whole_only(schedule, grid)]
    others = [i for i in range(len(sizes)) if i not in large]
    files = dict(zip(others, encode(wanted, others), strict=True))
    for i in large:
        rate, files[i] = _first_short_enough(encode, i, rates)
        if rate != wanted:
            height, width = sizes[i]
            reason = tokens_file.whole_only(schedule, grids[i])
            warnings.warn(
                f"picture {i} of {width}x{height} has rate {rate.name} instead of {wanted.name}: "
                f"all stages of {wanted.name} need more bytes, and {reason}",
                CoarserRateWarning,
                stacklevel=3,
            )
    return [files[i] for i in range(len(sizes))]


def _first_short_enough(
    encode: Callable[[Rate, Sequence[int]], list[bytes]], picture: int, rates: Sequence[Rate]
) -> tuple[Rate, bytes]:
    for rate in rates:
        try:
            (file,) = encode(rate, [picture])
        except TooFewBytes:
            if rate == rates[-1]:
                raise
        else:
            return rate, file
    raise ValueError("give at least one rate")
