"""Files of bounded length, at a coarser rate if a reader would accept only complete files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from percov2.container import tokens_file
from percov2.container.tokens_file import TooFewBytes
from percov2.models.config import Rate

__all__ = ["CoarserRateWarning", "encode_bounded"]


class CoarserRateWarning(UserWarning):
    """The warning that a file has a coarser rate than the requested rate."""


def encode_bounded(
    encode: Callable[[Rate, Sequence[int]], list[bytes]],
    sizes: Sequence[tuple[int, int]],
    rates: Sequence[Rate],
    schedule: int,
) -> list[bytes]:
    """Encode pictures at the first rate, or very large pictures at a coarser rate if necessary.

    Readers accept only complete files of very large pictures (docs/reference/bitstream.md,
    section 7). Such a picture takes the first rate whose complete file is short enough.

    Args:
        encode: a function from a rate and the indices of pictures to the pictures' files. It raises
            ``TooFewBytes`` if a file cannot be short enough.
        sizes: (height, width) of every picture in pixels.
        rates: the requested rate, then coarser rates.
        schedule: index of the entropy schedule.

    Raises:
        TooFewBytes: no file of a picture is short enough.

    Warns:
        CoarserRateWarning: a picture is encoded at a coarser rate than the first.
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
