"""Distances between a restored picture and its original.

MS-SSIM needs torchmetrics (extra ``eval``). LPIPS and DISTS need weights that are installed
separately (``perceptual.INSTALL_HINT``). A measure without a value is None, and a note gives the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from percov2.models.perceptual import DISTS, INSTALL_HINT, LPIPS, MetricWeightsMissing

__all__ = [
    "EVAL_HINT",
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

EVAL_HINT = "pip install 'percov2[eval]'"

Pixels = NDArray[np.uint8]


class Original:
    """An original, uint8 [H, W, 3] sRGB, for comparison with several restored pictures.

    Each network computes its features only once.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self._features: dict[str, list[Tensor]] = {}

    def features(self, name: str) -> list[Tensor]:
        """Return the original's features in the network of the measure ``name``."""
        if name not in self._features:
            self._features[name] = _features(name, self.pixels)
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
    device: str | torch.device = "cpu",
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


_BATCH = 4
"""Pictures per call of a network. Larger batches take more memory and are no faster on a CPU."""


@torch.inference_mode()
def _distances(
    name: str, originals: Pixels, restored: Pixels, device: str | torch.device
) -> NDArray[np.float64]:
    """Return LPIPS or DISTS, [N], of pictures, uint8 [N, H, W, 3], or raise NotMeasured."""
    network = _network(name, str(device))
    if len(originals):
        _require_side(originals[0], MIN_NETWORK_SIDE)
    found = [
        network(*(_seen(name, x[i : i + _BATCH]).to(device) for x in (restored, originals)))
        for i in range(0, len(originals), _BATCH)
    ]
    return torch.cat([torch.empty(0), *(x.cpu() for x in found)]).double().numpy()


def psnr(original: Pixels, restored: Pixels) -> float:
    """Return the peak signal-to-noise ratio in dB. Raise NotMeasured if the pictures are equal."""
    error = np.square(original.astype(np.float64) - restored.astype(np.float64)).mean()
    if error == 0:
        raise NotMeasured("the pictures are equal, so PSNR is infinite")
    return 10 * math.log10(255**2 / error)


def ms_ssim(original: Pixels, restored: Pixels) -> float:
    """Return the multi-scale structural similarity (Wang et al. 2003), the mean over R, G and B.

    The value is 0..1. Raises NotMeasured if a side is too short or torchmetrics is missing.
    """
    _require_side(original, MIN_MS_SSIM_SIDE)
    try:
        from torchmetrics.functional.image import (
            multiscale_structural_similarity_index_measure as compute,
        )
    except ImportError:
        raise NotMeasured(f"torchmetrics is missing; {EVAL_HINT}") from None
    pair = (_levels(x[None]) for x in (restored, original))
    return float(compute(*pair, data_range=1.0))


def _distance(name: str, original: Original, restored: Pixels) -> float:
    """Return LPIPS 0.1 (Zhang et al. 2018) or DISTS (Ding et al. 2020). Equal pictures give 0."""
    _require_side(original.pixels, MIN_NETWORK_SIDE)
    with torch.inference_mode():
        return float(_network(name).distance(_features(name, restored), original.features(name)))


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


def _levels(pixels: Pixels) -> Tensor:
    """Return pixels, uint8 [B, H, W, 3], as float [B, 3, H, W] in [0, 1] with channels last."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255


def _seen(name: str, pixels: Pixels) -> Tensor:
    """Return pixels as the input of a network."""
    return _levels(pixels) if name == "dists" else _levels(pixels) * 2 - 1


def _features(name: str, pixels: Pixels) -> list[Tensor]:
    with torch.inference_mode():
        return _network(name).features(_seen(name, pixels[None]))


@lru_cache(maxsize=6)
def _load_network(name: str, device: str) -> LPIPS | DISTS:
    network = DISTS() if name == "dists" else LPIPS(name.removeprefix("lpips_"))
    return convert_conv2d_weight_memory_format(network.eval().to(device), torch.channels_last)


def _network(name: str, device: str = "cpu") -> LPIPS | DISTS:
    try:
        return _load_network(name, device)
    except MetricWeightsMissing:
        raise NotMeasured(f"its weights are not installed; {INSTALL_HINT}") from None
