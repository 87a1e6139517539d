"""Draws of the tokens that a file does not hold, the same on every machine.

In the paper's hybrid mode (arXiv 2503.09368, section 3.3) a file holds the first stages and the
decoder draws the others. All numbers are integers. A place's random number depends only on the seed
and the place: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
is a function of a key and a counter. docs/reference/entropy-model.md, section 6, is normative.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from percov2.entropy import cdf

__all__ = ["AT_ONCE", "FLOOR_BITS", "MAX_SEED", "SHARPNESS", "check_draw", "draw", "philox"]


MAX_SEED = 2**16 - 1
"""Largest seed of a draw."""
SHARPNESS = 384
"""Logits are multiplied by this / 256 before a draw (a temperature of 2/3). Part of the format."""

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
FLOOR_BITS = 10
"""Weights below the largest weight >> FLOOR_BITS are never drawn."""
AT_ONCE = 2**22
"""Logits per draw: each takes 40 bytes of scratch memory."""


def philox(key: int, counter: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the Philox-4x32-10 words of 64-bit counters, uint32 [n, 4].

    Args:
        key: 0 to 2^64 - 1. The low half of the key is the first key word.
        counter: int64 [n], not negative. The low half of a counter is the first counter word; the
            last two counter words are 0.

    Raises:
        ValueError: a key or counter out of range.
    """
    if not 0 <= key < 2**64 or (counter.size and int(counter.min()) < 0):
        raise ValueError(f"key {key} must be 0 to 2^64 - 1 and no counter negative")
    wide = counter.astype(np.uint64)
    a, b = wide & _MASK, wide >> _SHIFT
    c, d = np.zeros_like(a), np.zeros_like(a)
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _SHIFT) ^ b ^ np.uint64(low),
            second & _MASK,
            (first >> _SHIFT) ^ d ^ np.uint64(high),
            first & _MASK,
        )
        low, high = (low + _KEY_STEPS[0]) & 0xFFFFFFFF, (high + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=-1).astype(np.uint32)


def _scaled(words: NDArray[np.uint32], total: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ⌊r·total / 2^64⌋ with r = 2^32·words[:, 0] + words[:, 1].

    The result has the shape of ``total`` [B, n], whose values are below 2^35.
    """
    high, low = words[:, 0].astype(np.int64), words[:, 1].astype(np.int64)
    # 16-bit pieces of the total keep every product below 2^52, so signed arithmetic suffices.
    upper, lower = total >> 16, total & 0xFFFF
    carry = low * upper + (low * lower >> 16) >> 16
    return high * upper + (high * lower + carry >> 16) >> 16


def check_draw(shape: tuple[int, ...], places: NDArray[np.int64], seed: int) -> None:
    """Raise ValueError unless the seed, the shape of logits and the places fit together."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed of a draw must be 0 to {MAX_SEED}, not {seed}")
    if len(shape) != 3 or places.shape != shape[1:2]:
        raise ValueError(
            f"logits have shape {shape} for {places.shape} places; they must be [B, n, V] for [n]"
        )


def draw(logits: NDArray[np.int16], places: NDArray[np.int64], seed: int) -> NDArray[np.int32]:
    """Draw tokens from logits sharpened by ``SHARPNESS``. Unlikely tokens are never drawn.

    Args:
        logits: int16 [B, n, V], to base 2 with 8 fractional bits.
        places: int64 [n], raster indices of the n positions. All grids of a batch share the random
            numbers.
        seed: 0 to ``MAX_SEED``.

    Returns:
        int32 [B, n] in 0 .. V - 1.

    Raises:
        ValueError: a wrong seed, shape or dtype.

    >>> draw(np.zeros((1, 4, 8), np.int16), np.arange(4), seed=0)
    array([[3, 7, 0, 6]], dtype=int32)
    """
    check_draw(logits.shape, places, seed)
    step = max(1, AT_ONCE // max(1, logits.shape[0] * logits.shape[2]))
    words = philox(seed, places)
    tokens = np.empty(logits.shape[:2], dtype=np.int32)
    for begin in range(0, len(places), step):
        part = slice(begin, begin + step)
        tokens[:, part] = _drawn(logits[:, part], words[part])
    return tokens


def _drawn(logits: NDArray[np.int16], words: NDArray[np.uint32]) -> NDArray[np.int32]:
    """Return tokens [B, n] from the random words [n, 4] of their places."""
    weights = cdf.weights(logits, SHARPNESS)
    weights[weights < weights.max(2, keepdims=True) >> FLOOR_BITS] = 0
    prefix = weights.cumsum(2)
    target = _scaled(words, prefix[..., -1])
    return (prefix <= target[..., None]).sum(2, dtype=np.int32)
