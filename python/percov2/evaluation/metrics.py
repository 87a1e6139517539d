"""Distances between a restored picture and its original.

PSNR and MS-SSIM need numpy only. LPIPS and DISTS are networks: they need the extra ``eval``, and
weights that are installed separately (``perceptual.INSTALL_HINT``). A missing value is None, and a
note gives the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.extras import MissingExtra, require

__all__ = [
    "HIGHER_IS_BETTER",
    "METRICS",
    "NotMeasured",
    "Original",
    "Pixels",
    "measure",
    "measure_batch",
    "ms_ssim",
    "psnr",
]

METRICS: tuple[str, ...] = ("psnr", "ms_ssim", "lpips_alex", "lpips_vgg", "dists")
HIGHER_IS_BETTER = frozenset({"psnr", "ms_ssim"})

MIN_MS_SSIM_SIDE = 176
"""Shortest side for MS-SSIM, which has an 11-pixel window at five scales, down to 1/16."""
MIN_NETWORK_SIDE = 32
"""Shortest side for the networks, which halve a picture five times."""

_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = np.exp(-(np.arange(-5, 6, dtype=np.float32) ** 2) / (2 * 1.5**2))
_WINDOW /= _WINDOW.sum()

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Original:
    """An original, uint8 [H, W, 3] sRGB, for comparison with several restored pictures.

    Each network computes its features only once.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self._features: dict[str, Any] = {}

    def features(self, name: str) -> Any:
        """Return the picture's features in the network of a measure."""
        if name not in self._features:
            self._features[name] = _networks().features(name, self.pixels)
        return self._features[name]


class NotMeasured(Exception):
    """The error that says why a measure has no value for this picture or on this machine."""


def measure(
    original: Pixels | Original, restored: Pixels, names: Sequence[str] = METRICS
) -> tuple[dict[str, float | None], list[str]]:
    """Measure a restored picture, uint8 [H, W, 3] sRGB, by a selection of ``METRICS``.

    Returns the values by name, and notes. A measure without a value is None, and a note gives the
    reason. Raises ValueError if shapes or dtypes do not match, or if a name is unknown.
    """
    known = original if isinstance(original, Original) else Original(original)
    for pixels in (known.pixels, restored):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"pictures are uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    if known.pixels.shape != restored.shape:
        raise ValueError(f"a picture of {restored.shape} cannot match one of {known.pixels.shape}")
    values: dict[str, float | None] = {}
    notes: list[str] = []
    for name in names:
        if name not in _MEASURES:
            raise ValueError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        try:
            values[name] = _MEASURES[name](known, restored)
        except NotMeasured as reason:
            values[name] = None
            notes.append(f"{name} was not measured: {reason}")
    return values, notes


def measure_batch(
    originals: Pixels,
    restored: Pixels,
    names: Sequence[str] = METRICS,
    device: str = "cpu",
) -> tuple[dict[str, NDArray[np.float64]], list[str]]:
    """Measure restored pictures, uint8 [N, H, W, 3] sRGB, with the networks on a device.

    Returns the values, float64 [N], by name, and notes. A missing value is nan, and a note gives
    the reason. The errors are those of ``measure``.
    """
    if originals.ndim != 4 or originals.shape != restored.shape:
        raise ValueError(f"pictures of {restored.shape} cannot match those of {originals.shape}")
    values = {name: np.full(len(originals), np.nan) for name in names}
    notes: set[str] = set()
    others = [name for name in names if name not in _NETWORKS]
    for i, (original, picture) in enumerate(zip(originals, restored, strict=True)):
        found, reasons = measure(original, picture, others)
        notes.update(reasons)
        for name in others:
            values[name][i] = np.nan if found[name] is None else found[name]
    for name in _NETWORKS:
        if name in names:
            try:
                values[name][:] = _distances(name, originals, restored, device)
            except NotMeasured as reason:
                notes.add(f"{name} was not measured: {reason}")
    return values, sorted(notes)


def _distances(name: str, originals: Pixels, restored: Pixels, device: str) -> NDArray[np.float64]:
    networks = _networks()
    if len(originals):
        _require_side(originals[0], MIN_NETWORK_SIDE)
    try:
        return networks.distances(name, originals, restored, device)
    except networks.MetricWeightsMissing as error:
        raise NotMeasured(str(error)) from None


def psnr(original: Pixels, restored: Pixels) -> float:
    """Return the peak signal-to-noise ratio in dB. Raise NotMeasured if the pictures are equal."""
    error = np.square(original.astype(np.float64) - restored.astype(np.float64)).mean()
    if error == 0:
        raise NotMeasured("the pictures are equal, so PSNR is infinite")
    return 10 * math.log10(255**2 / error)


def ms_ssim(original: Pixels, restored: Pixels) -> float:
    """Return the multi-scale structural similarity, 0..1 (Wang et al. 2003), mean over R, G, B.

    It has five scales and an 11-pixel Gaussian window with σ = 1.5, without padding.
    """
    _require_side(original, MIN_MS_SSIM_SIDE)
    planes = (pixels.transpose(2, 0, 1).astype(np.float32) for pixels in (original, restored))
    x, y = (levels / np.float32(255) for levels in planes)
    value = 1.0
    for scale, exponent in enumerate(_EXPONENTS):
        similarity, contrast = _ssim(x, y)
        last = scale == len(_EXPONENTS) - 1
        value *= max(similarity if last else contrast, 0.0) ** exponent
        if not last:
            x, y = _halved(x), _halved(y)
    return value


def _ssim(x: Floats, y: Floats) -> tuple[float, float]:
    """Return the structural similarity of planes [3, H, W] and its part without luminance."""
    mean_x, mean_y = _blurred(x), _blurred(y)
    square_x, square_y, product = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    spread = _blurred(x * x) - square_x + _blurred(y * y) - square_y
    contrast = (2 * (_blurred(x * y) - product) + 0.03**2) / (spread + 0.03**2)
    luminance = (2 * product + 0.01**2) / (square_x + square_y + 0.01**2)
    return float((luminance * contrast).mean(dtype=float)), float(contrast.mean(dtype=float))


def _blurred(planes: Floats) -> Floats:
    """Return planes [3, H, W] under the Gaussian window, [3, H - 10, W - 10]."""
    for axis in (1, 2):
        length = planes.shape[axis] - len(_WINDOW) + 1
        places = [range(i, i + length) for i in range(len(_WINDOW))]
        total = np.zeros_like(planes.take(places[0], axis))
        for weight, place in zip(_WINDOW, places, strict=True):
            total += weight * planes.take(place, axis)
        planes = total
    return planes


def _halved(planes: Floats) -> Floats:
    """Return the means of 2×2 pixels; an odd last row or column is left out."""
    channels, height, width = planes.shape
    even = planes[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(channels, height // 2, 2, width // 2, 2).mean((2, 4))


def _distance(name: str, original: Original, restored: Pixels) -> float:
    """Return LPIPS 0.1 (Zhang et al. 2018) or DISTS (Ding et al. 2020). Equal pictures give 0."""
    _require_side(original.pixels, MIN_NETWORK_SIDE)
    networks = _networks()
    try:
        return networks.distance(name, networks.features(name, restored), original.features(name))
    except networks.MetricWeightsMissing as error:
        raise NotMeasured(str(error)) from None


def _networks() -> Any:
    """Return the module of the networks, which needs torch."""
    try:
        require("eval", "it", "torch", "torchmetrics")
    except MissingExtra as error:
        raise NotMeasured(str(error)) from None
    from percov2.evaluation import metric_networks

    return metric_networks


_NETWORKS = ("lpips_alex", "lpips_vgg", "dists")
_MEASURES: dict[str, Callable[[Original, Pixels], float]] = {
    "psnr": lambda original, restored: psnr(original.pixels, restored),
    "ms_ssim": lambda original, restored: ms_ssim(original.pixels, restored),
    **{name: partial(_distance, name) for name in _NETWORKS},
}


def _require_side(pixels: Pixels, least: int) -> None:
    height, width = pixels.shape[:2]
    if min(height, width) < least:
        raise NotMeasured(f"it needs sides of {least} pixels, but the picture is {width}x{height}")
