"""Captions of the small model as rows of a table: hashed words, no vocabulary file.

A caption is lower-cased and split into words; each word's CRC-32 picks a row of an embedding table.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["caption_rows"]

_WORD = re.compile(r"\w+")


def caption_rows(captions: Sequence[str], buckets: int, length: int) -> NDArray[np.int64]:
    """Return table rows int64 [B, length] of the captions' first ``length`` words.

    The table has ``buckets`` rows; row 0 is padding, and the empty caption is all padding.
    """
    rows = np.zeros((len(captions), length), np.int64)
    for row, caption in zip(rows, captions, strict=True):
        words = _WORD.findall(caption.lower())[:length]
        row[: len(words)] = [1 + zlib.crc32(word.encode()) % (buckets - 1) for word in words]
    return rows
