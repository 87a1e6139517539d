"""Measures of how well a restored picture matches its original.

PSNR needs nothing; MS-SSIM needs torchmetrics (extra ``eval``); LPIPS and DISTS need weights that
are installed separately (``perceptual.INSTALL_HINT``). What cannot be measured is None, with a note
that says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.evaluation.perceptual import DISTS, INSTALL_HINT, LPIPS, MetricWeightsMissing

METRICS: tuple[str, ...] = ("psnr", "ms_ssim", "lpips_alex", "lpips_vgg", "dists")
HIGHER_IS_BETTER = frozenset({"psnr", "ms_ssim"})

MIN_MS_SSIM_SIDE = 176
"""Five scales, the last one 1/16, with an 11-pixel window."""
MIN_NETWORK_SIDE = 32
"""The networks halve a picture five times."""

EVAL_HINT = "pip install 'percov2[eval]'"

Pixels = NDArray[np.uint8]


class NotMeasured(Exception):
    """A measure has no value for this picture or on this machine; the message says why."""


def measure(
    original: Pixels, restored: Pixels, names: Sequence[str] = METRICS
) -> tuple[dict[str, float | None], list[str]]:
    """Measure a restored picture.

    Args:
        original: uint8 [H, W, 3], sRGB.
        restored: the same shape.
        names: which of ``METRICS``.

    Returns:
        Name -> value, None where there is none, and one note for each None.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown name.
    """
    for pixels in (original, restored):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"pictures are uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    if original.shape != restored.shape:
        raise ValueError(f"a picture of {restored.shape} cannot match one of {original.shape}")
    values: dict[str, float | None] = {}
    notes: list[str] = []
    for name in names:
        if name not in _MEASURES:
            raise ValueError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        try:
            values[name] = _MEASURES[name](original, restored)
        except NotMeasured as reason:
            values[name] = None
            notes.append(f"{name} was not measured: {reason}")
    return values, notes


def psnr(original: Pixels, restored: Pixels) -> float:
    """Peak signal-to-noise ratio in dB over all samples, peak 255. NotMeasured for equal ones."""
    error = np.square(original.astype(np.float64) - restored.astype(np.float64)).mean()
    if error == 0:
        raise NotMeasured("the pictures are equal, PSNR is infinite")
    return 10 * math.log10(255**2 / error)


def ms_ssim(original: Pixels, restored: Pixels) -> float:
    """Multi-scale structural similarity in 0..1 (Wang et al. 2003), mean over R, G, B."""
    _require_side(original, MIN_MS_SSIM_SIDE)
    try:
        from torchmetrics.functional.image import (
            multiscale_structural_similarity_index_measure as compute,
        )
    except ImportError:
        raise NotMeasured(f"torchmetrics is missing; {EVAL_HINT}") from None
    value = compute(_tensor(restored), _tensor(original), data_range=1.0)
    return float(value)


def lpips(original: Pixels, restored: Pixels, network: str) -> float:
    """LPIPS 0.1 with network "alex" or "vgg" (Zhang et al. 2018), 0 for equal pictures."""
    return _distance(f"lpips_{network}", original, restored)


def dists(original: Pixels, restored: Pixels) -> float:
    """DISTS (Ding et al. 2020), 0 for equal pictures."""
    return _distance("dists", original, restored)


_MEASURES: dict[str, Callable[[Pixels, Pixels], float]] = {
    "psnr": psnr,
    "ms_ssim": ms_ssim,
    "lpips_alex": lambda original, restored: lpips(original, restored, "alex"),
    "lpips_vgg": lambda original, restored: lpips(original, restored, "vgg"),
    "dists": dists,
}


def _tensor(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> float [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


def _require_side(pixels: Pixels, least: int) -> None:
    height, width = pixels.shape[:2]
    if min(height, width) < least:
        raise NotMeasured(f"it needs sides of {least} pixels, the picture is {width}x{height}")


def _distance(name: str, original: Pixels, restored: Pixels) -> float:
    _require_side(original, MIN_NETWORK_SIDE)
    network = _network(name)
    expected = _original_features(name, original.shape, original.tobytes())
    with torch.inference_mode():
        return float(network.distance(network.features(_seen(name, restored)), expected))


# Many pictures are measured against the same original: one of each network's is kept.
@lru_cache(maxsize=3)
def _original_features(name: str, shape: tuple[int, ...], data: bytes) -> list[Tensor]:
    original = np.frombuffer(data, np.uint8).reshape(shape)
    with torch.inference_mode():
        return _network(name).features(_seen(name, original))


def _seen(name: str, pixels: Pixels) -> Tensor:
    """A picture in the range that a network takes."""
    return _tensor(pixels) if name == "dists" else _tensor(pixels) * 2 - 1


@lru_cache(maxsize=3)
def _load_network(name: str) -> LPIPS | DISTS:
    network = DISTS() if name == "dists" else LPIPS(name.removeprefix("lpips_"))
    return network.eval()


def _network(name: str) -> LPIPS | DISTS:
    try:
        return _load_network(name)
    except MetricWeightsMissing:
        raise NotMeasured(f"its weights are not installed; {INSTALL_HINT}") from None
