"""Overlapping windows in which the flow paints pictures of any size, and its Euler steps.

The functions take arrays of numpy or tensors of torch alike, or numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Windows", "sample", "whole_patches", "window_side", "window_starts"]


def whole_patches(length: int, patch: int) -> int:
    """Round a side up to a multiple of the flow's patch side."""
    return -(-length // patch) * patch


def window_side(length: int, window: int, overlap: int, unit: int = 1) -> int:
    """Return the side of the windows that cover ``length`` positions with the least work.

    Where one window is too short, these are the fewest windows of at most 9/8 of ``window``, and
    among those the smallest, a multiple of ``unit``. If there is none, the side is ``window``.

    >>> [window_side(length, 32, 8, unit=2) for length in (24, 36, 64, 96)]
    [32, 36, 36, 30]
    """
    count, exact = 0, length
    while exact > window:
        count += 1
        exact = -(-(length + (count - 1) * overlap) // count)
        side = -(-exact // unit) * unit
        if side <= window * 9 // 8:
            return side
    return window


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return starts of windows that cover 0 … length − 1; the last one may overlap more."""
    return [*range(0, length - window, stride), max(0, length - window)]


def _ramp(length: int, overlap: int) -> NDArray[np.float32]:
    """Return positive blending weights [length] that rise over ``overlap`` entries at both ends."""
    place = np.arange(length)
    rise = (np.minimum(place, place[::-1]) + 1) / (overlap + 1)
    return np.minimum(rise, 1).astype(np.float32)


@dataclass(frozen=True)
class Windows:
    """Windows that cover a grid of latents, and the weights that blend their estimates.

    Attributes:
        places: the rows and columns of every window; all have one size.
        weight: float32 [rows, columns], the weight of an estimate.
        norm: float32 [height, width], the sum of all weights at a position.
    """

    places: list[tuple[slice, slice]]
    weight: NDArray[np.float32]
    norm: NDArray[np.float32]

    @classmethod
    def covering(cls, sides: tuple[int, int], windows: tuple[int, int], overlap: int) -> Windows:
        """Return windows for a grid of sides (height, width).

        A window has at most ``windows`` positions a side and shares ``overlap`` with its neighbour.

        Raises:
            ValueError: an overlap that is negative or not below the windows.
        """
        if not 0 <= overlap < min(windows):
            raise ValueError(f"overlap must lie in 0…{min(windows) - 1}, not {overlap}")
        rows, columns = map(min, windows, sides)
        tops, lefts = (
            window_starts(side, window, window - overlap)
            for side, window in zip(sides, windows, strict=True)
        )
        places = [(slice(y, y + rows), slice(x, x + columns)) for y, x in product(tops, lefts)]
        weight = _ramp(rows, overlap)[:, None] * _ramp(columns, overlap)
        norm = np.zeros(sides, np.float32)
        for ys, xs in places:
            norm[ys, xs] += weight
        return cls(places, weight, norm)


def sample(
    estimate: Callable[[Any, Any, float], Any],
    z_hat: Any,
    noise: Any,
    steps: int,
    shift: float = 3.0,
) -> Any:
    """Sample the flow by Euler steps from t = 1 to 0.

    Args:
        estimate: maps (x_t, z_hat, t) to an estimate of the clean latents (guidance included).
        z_hat, noise: [B, C, h, w] and x_1 [B, 16, h, w], on the latent grid.
        steps: number of evaluations. One returns the estimate at t = 1; ValueError for none.
        shift: SD3's timestep shift; larger spends more steps near t = 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    uniform = [1 - i / steps for i in range(steps + 1)]
    times = [shift * u / (1 + (shift - 1) * u) for u in uniform]
    x = noise
    for now, after in pairwise(times):
        clean = estimate(x, z_hat, now)
        x = clean + (x - clean) * (after / now)
    return x
