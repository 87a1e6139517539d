"""The draws of ``percov2.entropy.sampling`` on any device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy.sampling import AT_ONCE, FLOOR_BITS, SHARPNESS, check_draw, philox
from percov2.entropy.torch import cdf

__all__ = ["draw", "draw_with"]


def _scaled(words: NDArray[np.uint32], total: torch.Tensor) -> torch.Tensor:
    """Return ⌊r·total / 2^64⌋ with r = 2^32·words[:, 0] + words[:, 1].

    The result has the shape of ``total``, whose values are below 2^35.
    """
    placed = torch.from_numpy(words[:, :2].astype(np.int64)).to(total.device)
    high, low = placed[:, 0], placed[:, 1]
    # 16-bit pieces of the total keep every product below 2^52, so signed arithmetic suffices.
    upper, lower = total >> 16, total & 0xFFFF
    carry = low * upper + (low * lower >> 16) >> 16
    return high * upper + (high * lower + carry >> 16) >> 16


def draw(logits: torch.Tensor, places: NDArray[np.int64], seed: int) -> torch.Tensor:
    """Draw tokens int32 [B, n] on the logits' device.

    The arguments and errors are those of ``percov2.entropy.sampling.draw``, but the logits are a
    tensor.

    >>> draw(torch.zeros(1, 4, 8, dtype=torch.int16), np.arange(4), seed=0)
    tensor([[3, 7, 0, 6]], dtype=torch.int32)
    """
    check_draw(tuple(logits.shape), places, seed)
    return draw_with(logits, philox(seed, places))


def draw_with(logits: torch.Tensor, words: NDArray[np.uint32]) -> torch.Tensor:
    """Draw tokens int32 [B, n] with the random words of their places, uint32 [n, 4]."""
    step = max(1, AT_ONCE // max(1, logits.shape[0] * logits.shape[2]))
    tokens = torch.empty(logits.shape[:2], dtype=torch.int32, device=logits.device)
    for begin in range(0, len(words), step):
        part = slice(begin, begin + step)
        tokens[:, part] = _drawn(logits[:, part], words[part])
    return tokens


def _drawn(logits: torch.Tensor, words: NDArray[np.uint32]) -> torch.Tensor:
    """Return tokens int32 [B, n] from the random words [n, 4] of their places."""
    weights = cdf.weights(logits, SHARPNESS)
    weights[weights < weights.amax(2, keepdim=True) >> FLOOR_BITS] = 0
    prefix = weights.cumsum(2)
    target = _scaled(words, prefix[..., -1])
    return torch.searchsorted(prefix, target[..., None], right=True)[..., 0].to(torch.int32)
