"""LPIPS and DISTS of pictures, uint8 sRGB, in torch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from percov2.models.torch.perceptual import DISTS, INSTALL_HINT, LPIPS, MetricWeightsMissing

__all__ = ["MetricWeightsMissing", "distance", "distances", "features"]

Pixels = NDArray[np.uint8]
_BATCH = 4
"""Number of pictures per network call. Larger batches take memory and are no faster on a CPU."""


@torch.inference_mode()
def features(name: str, pixels: Pixels) -> list[Tensor]:
    """Return the features of a picture, uint8 [H, W, 3], in the network of a metric.

    Raises:
        MetricWeightsMissing: the network's weights are not installed.
    """
    return _network(name).features(_seen(name, pixels[None]))


@torch.inference_mode()
def distance(name: str, restored: list[Tensor], original: list[Tensor]) -> float:
    """Return the distance of two pictures from their ``features``."""
    return float(_network(name).distance(restored, original))


@torch.inference_mode()
def distances(name: str, originals: Pixels, restored: Pixels, device: str) -> NDArray[np.float64]:
    """Return the distances [N] of pictures uint8 [N, H, W, 3], computed on a device.

    Raises:
        MetricWeightsMissing: the network's weights are not installed.
    """
    network = _network(name, device)
    found = [
        network(*(_seen(name, x[i : i + _BATCH]).to(device) for x in (restored, originals)))
        for i in range(0, len(originals), _BATCH)
    ]
    return torch.cat([torch.empty(0), *(x.cpu() for x in found)]).double().numpy()


def _seen(name: str, pixels: Pixels) -> Tensor:
    """Return a network's input, channels last, of pixels uint8 [B, H, W, 3]."""
    levels = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
    return levels if name == "dists" else levels * 2 - 1


@lru_cache(maxsize=6)
def _load_network(name: str, device: str) -> LPIPS | DISTS:
    network = DISTS() if name == "dists" else LPIPS(name.removeprefix("lpips_"))
    return convert_conv2d_weight_memory_format(network.eval().to(device), torch.channels_last)


def _network(name: str, device: str = "cpu") -> LPIPS | DISTS:
    try:
        return _load_network(name, device)
    except MetricWeightsMissing:
        text = f"its weights are not installed; {INSTALL_HINT}"
        raise MetricWeightsMissing(text) from None
