"""FID and KID as the package clean-fid computes them (Parmar et al. 2022, arXiv 2104.11222).

The features are those of clean-fid 0.1.35 in mode "clean": a picture is resized to 299×299 by
Pillow's bicubic filter, one float channel at a time, clipped to 0..255 and not rounded. It then
goes through Inception in a TorchScript file, which the user supplies. FID is computed from means
and unbiased covariances, KID from random subsets. Unlike clean-fid, both are computed in float64,
and the subsets of KID come from a seed of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from percov2.evaluation.feature_sets import FeatureNetwork, Pixels, file_digest
from percov2.evaluation.realism import frechet_distance

__all__ = [
    "INCEPTION_FILE",
    "INCEPTION_URL",
    "InceptionFeatures",
    "InceptionMissing",
    "describe",
    "fid",
    "kid",
    "resized",
]

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + INCEPTION_FILE
)
"""Address from which clean-fid 0.1.35 fetches the network."""

_SIDE = 299
SUBSETS, SUBSET_SIZE = 100, 1000
"""Number of KID's subsets, and their largest size."""

AnyFeatures = NDArray[np.float32] | NDArray[np.float64]


class InceptionMissing(FileNotFoundError):
    """The error that says which file holds Inception, and where it is published."""


def resized(picture: Pixels) -> NDArray[np.float32]:
    """Return a picture, uint8 [H, W, 3], at 299×299: float32 [299, 299, 3] in 0..255.

    The channels are resized as Pillow images of mode F with the bicubic filter, which includes
    antialiasing, and then clipped. Values are not rounded. A picture of 299×299 keeps its values.
    """
    planes = [
        Image.fromarray(picture[:, :, channel].astype(np.float32)).resize(
            (_SIDE, _SIDE), Image.Resampling.BICUBIC
        )
        for channel in range(3)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2).clip(0, 255)


class InceptionFeatures(FeatureNetwork):
    """The features that clean-fid compares: the 2,048 numbers before Inception's last layer.

    As clean-fid does in mode "clean", it calls the file's ``layers`` with (x - 128) / 128, because
    the file's own entry point would resize once more. The settings of torch apply, among them TF32.

    Args:
        path: the file ``inception-2015-12-05.pt``, or the folder that holds it. Load only a file
            that you trust, because TorchScript is a program.
        device: device of the network.
        batch_size: number of pictures per call of the network.
        threads: number of threads that resize pictures.

    Raises:
        InceptionMissing: there is no such file.
        ValueError: the file is no TorchScript network with ``layers``.
    """

    def __init__(
        self, path: Path | str, device: str = "cpu", batch_size: int = 32, threads: int = 4
    ) -> None:
        super().__init__(device, batch_size, threads)
        path = Path(path)
        if path.is_dir():
            path /= INCEPTION_FILE
        if not path.is_file():
            raise InceptionMissing(
                f"{path} is missing: FID and KID need {INCEPTION_FILE}, which percov2 does not "
                f"contain; fetch it from {INCEPTION_URL}, where clean-fid fetches it too"
            )
        try:
            network: Any = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path} is no TorchScript file: {reason}") from error
        if not hasattr(network, "layers"):
            raise ValueError(f"{path} is not {INCEPTION_FILE}: its network has no layers")
        self._layers = network.layers
        self.title = f"Inception {path.name}, SHA-256 {file_digest(path)}, clean"

    def _prepared(self, picture: Pixels) -> Tensor:
        return torch.from_numpy(resized(picture)).permute(2, 0, 1)

    def _seen(self, batch: Tensor) -> Tensor:
        return self._layers((batch - 128) / 128).reshape(len(batch), -1)


def fid(originals: AnyFeatures, restored: AnyFeatures) -> float:
    """Return the Fréchet inception distance of features [N, D] and [M, D].

    It is ``frechet_distance`` of percov2.evaluation.realism. clean-fid takes the matrix root by
    scipy's sqrtm and, where that fails, adds 1e-6 to the covariances. Singular values need no such
    help. Raises ValueError if a set has fewer than two rows or if the features do not match.
    """
    return frechet_distance(originals.astype(np.float64), restored.astype(np.float64))


def kid(
    originals: AnyFeatures,
    restored: AnyFeatures,
    generator: np.random.Generator | np.random.RandomState | int = 0,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
) -> float:
    """Return the kernel inception distance of features [N, D] and [M, D].

    It is the mean, over random subsets, of the unbiased estimate of the squared maximum mean
    discrepancy with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, arXiv 1801.01401). Each
    subset has m = min(N, M, ``subset_size``) rows of each set, drawn without replacement, first
    from ``restored``. The value is not scaled; papers often print it times 1,000.

    ``generator`` draws the subsets; a number is the seed of a new one. ``RandomState(seed)`` draws
    those that clean-fid draws after ``np.random.seed(seed)``. Raises ValueError if a set has fewer
    than two rows or if the features do not match.
    """
    if originals.ndim != 2 or restored.ndim != 2 or originals.shape[1] != restored.shape[1]:
        raise ValueError(f"features {originals.shape} and {restored.shape} do not match")
    size = min(len(originals), len(restored), subset_size)
    if size < 2 or subsets < 1:
        raise ValueError(f"KID needs subsets of two pictures or more, not {subsets} of {size}")
    if isinstance(generator, int):
        generator = np.random.default_rng(generator)
    total = 0.0
    for _ in range(subsets):
        x = restored[generator.choice(len(restored), size, replace=False)].astype(np.float64)
        y = originals[generator.choice(len(originals), size, replace=False)].astype(np.float64)
        within = _kernel(x, x) + _kernel(y, y)
        pairs = (within.sum() - np.trace(within)) / (size * (size - 1))
        total += pairs - 2 * _kernel(x, y).mean()
    return float(total / subsets)


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    base = a @ b.T / a.shape[1] + 1
    return base * base * base


def describe(network: FeatureNetwork) -> str:
    """Return the definition of FID and KID with the network and the versions, for reports."""
    return (
        "FID and KID as clean-fid 0.1.35 (mode clean) defines them: pictures resized to 299x299 by "
        "Pillow's bicubic filter per float channel, clipped, not rounded; 2,048 features; Fréchet "
        f"distance of Gaussians with unbiased covariances in float64; KID with (x·y/D + 1)³, "
        f"{SUBSETS} subsets of at most {SUBSET_SIZE} pictures, unscaled. "
        f"Network: {network.title}. torch {torch.__version__}, Pillow {PIL.__version__}, "
        f"numpy {np.__version__}."
    )
