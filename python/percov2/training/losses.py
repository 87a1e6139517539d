"""The losses of the joint phase, with their weights and views and the effect of realism.

The loss of a sample with realism β is

    L1 + (1 − β)·mse·MSE + β·(alex·LPIPS(AlexNet) + vgg·LPIPS(VGG16) + adversaries).

Thus one model learns the whole range from faithful to realistic pictures, as in Multi-Realism
Image Compression (Agustsson et al. 2023, arXiv 2212.13824) and CRDR (Iwai et al. 2024, arXiv
2306.01150).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from percov2.models.torch.perceptual import LPIPS

__all__ = ["FEATURES", "FEATURE_CHANNELS", "Comparison", "LossTerms", "PerceptualNetworks", "Term"]
__all__ += ["View", "draw_view", "least_side", "weighted"]

_STRIDE = 16
"""Stride in pixels of the last slices of AlexNet and VGG16."""
_LEAST_SIDE = 32


@dataclass(frozen=True)
class Term:
    """The weight of a loss over the steps of a run.

    Raises:
        ValueError: a value is below 0.
    """

    weight: float = 0.0  # final weight
    from_step: int = 0  # first step with a weight above 0
    warmup: int = 0  # steps of a linear rise after ``from_step``

    def __post_init__(self) -> None:
        if not min(self.weight, self.from_step, self.warmup) >= 0:
            raise ValueError(f"weight, from_step and warmup must not be negative: {self}")

    def at(self, step: int) -> float:
        """Return the weight at a step."""
        done = step - self.from_step
        return 0.0 if done < 0 else self.weight * min(1.0, (done + 1) / (self.warmup + 1))


@dataclass(frozen=True)
class LossTerms:
    """The weights of the losses at one rate, relative to L1."""

    mse: Term = Term()  # mean squared error at realism 0
    alex: Term = Term()  # LPIPS (AlexNet)
    vgg: Term = Term()  # LPIPS (VGG16)
    # Root mean square of the pixel discriminator's gradient at the picture, relative to L1's.
    pixels: Term = Term()
    features: Term = Term()  # hinge loss of the feature discriminator

    def at(self, step: int) -> dict[str, float]:
        """Return the nonzero weights at a step, by name."""
        weights = {term.name: getattr(self, term.name).at(step) for term in fields(self)}
        return {name: weight for name, weight in weights.items() if weight}

    def named(self) -> list[str]:
        """Return the names of the terms that are not 0 at some step."""
        return [term.name for term in fields(self) if getattr(self, term.name).weight]


def _cut(images: Tensor, corner: Tensor, height: int, width: int) -> Tensor:
    """Return the part of images [B, 3, H, W] whose top left corner is ``corner`` (row, column)."""
    # Slices would not follow a new corner when a recorded step is repeated.
    rows = corner[0] + torch.arange(height, device=corner.device)
    columns = corner[1] + torch.arange(width, device=corner.device)
    return images.index_select(-2, rows).index_select(-1, columns)


def least_side(coarse: bool) -> int:
    """Return the smallest side in pixels of pictures for AlexNet.

    If ``coarse`` is True, AlexNet sees the pictures at half size.
    """
    return _LEAST_SIDE * (2 if coarse else 1) + _STRIDE - 1


@dataclass(frozen=True)
class View:
    """The parts of a batch's pictures that the perceptual networks see.

    The strides of AlexNet's slices are 4, 8 and 16 pixels, and the decoder and the flow have blocks
    of 4×4 and 16×16 pixels. With a fixed alignment, both would learn patterns that fit only one
    network. Therefore every batch draws the position of its view.
    """

    shift: Tensor | None  # row, column of AlexNet's first pixel, int64 [2], 0 to 15; None for all
    window: Tensor  # row, column of the first pixel of VGG16's window, int64 [2]
    window_side: int  # in pixels
    coarse: bool = False  # True if AlexNet sees means of 2×2 pixels


def _drawn(share: float) -> bool:
    """Return True for a random share of calls. Draw nothing if the share is 0 or 1."""
    return share >= 1 or (share > 0 and float(torch.rand(())) < share)


def draw_view(side: int, aligned: float, coarse: float, window_side: int) -> View:
    """Draw the view of a batch of crops.

    Args:
        side: side of the crops in pixels.
        aligned: share of the calls in which AlexNet sees whole pictures.
        coarse: share of the calls in which AlexNet sees means of 2×2 pixels.
        window_side: largest side in pixels for VGG16, the most expensive network.
    """
    shift = None if _drawn(aligned) else torch.randint(_STRIDE, (2,))
    # This leaves room to move the window, so that VGG16 sees every phase of its strides.
    window_side = min(window_side, side - _STRIDE + 1)
    window = torch.randint(side - window_side + 1, (2,))
    return View(shift, window, window_side, _drawn(coarse))


@dataclass(frozen=True)
class Comparison:
    """The differences between a batch of pictures and its photos, float [B] with one per sample."""

    l1: Tensor
    mse: Tensor
    alex: Tensor | None  # None if its weight is 0
    vgg: Tensor | None
    found: list[Tensor]  # responses of frozen networks to the pictures, for a discriminator
    wanted: list[Tensor]  # the same for the photos


FEATURES = (("alex", 2), ("vgg", 1), ("vgg", 2), ("vgg", 3))
"""Network and slice (from 0) of each input of the feature discriminator. These are AlexNet at 1/16,
and VGG16 at 1/2, 1/4 and 1/8 of the resolution."""
FEATURE_CHANNELS = (384, 128, 256, 512)


class PerceptualNetworks(nn.Module):
    """The frozen networks of the losses. Each runs once per batch.

    ``names`` selects from "alex" and "vgg". EfficientNet-Lite0 and DISTS are never used in a loss,
    because they judge the results.

    Raises:
        MetricWeightsMissing: the weights are not installed.
    """

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: LPIPS(name) for name in sorted(names)})
        for weight in self.networks.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def compare(
        self, images: Tensor, references: Tensor, view: View, active: frozenset[str]
    ) -> Comparison:
        """Compare pictures with photos, float [B, 3, H, W] in [-1, 1].

        Args:
            images: the pictures.
            references: the photos.
            view: the parts that the networks see.
            active: names of the terms whose weight is not 0 (``LossTerms.at``).

        Raises:
            ValueError: a side of the pictures is below AlexNet's minimum, which is 47 pixels, or 79
                for a coarse view.
        """
        least = least_side(view.coarse)
        if min(images.shape[-2:]) < least:
            small = f"crops of {images.shape[-1]}x{images.shape[-2]} are too small for LPIPS"
            raise ValueError(f"{small}; sides must be at least {least} pixels")
        error = images.float() - references
        distances: dict[str, Tensor] = {}
        found: dict[str, list[Tensor]] = {}
        wanted: dict[str, list[Tensor]] = {}
        for name, network in self.networks.items():
            assert isinstance(network, LPIPS)
            if name not in active and "features" not in active:
                continue
            ours, theirs = (_seen(name, x, view) for x in (images, references))
            with torch.no_grad():
                wanted[name] = network.responses(theirs)
            found[name] = network.responses(ours)
            if name in active:
                pair = network.normalized(found[name]), network.normalized(wanted[name])
                distances[name] = network.distance(*pair)
        judged = FEATURES if "features" in active else ()
        return Comparison(
            error.abs().mean((1, 2, 3)),
            error.square().mean((1, 2, 3)),
            distances.get("alex"),
            distances.get("vgg"),
            [found[name][i] for name, i in judged],
            [wanted[name][i] for name, i in judged],
        )


def _seen(network: str, images: Tensor, view: View) -> Tensor:
    """Return the part of the images that a network sees."""
    if network == "vgg":
        return _cut(images, view.window, view.window_side, view.window_side)
    if view.shift is not None:
        height, width = (side - _STRIDE + 1 for side in images.shape[-2:])
        images = _cut(images, view.shift, height, width)
    return F.avg_pool2d(images, 2) if view.coarse else images


def weighted(
    comparison: Comparison, realism: Tensor, weights: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch without its adversaries, and figures to log.

    Args:
        comparison: the result of ``PerceptualNetworks.compare``.
        realism: β of every sample, float [B] in [0, 1].
        weights: weights of the terms by name, scalars.

    Returns:
        The loss, and the batch's means of l1, lpips (AlexNet) and vgg. A mean is NaN if it was not
        measured.
    """
    loss = comparison.l1.mean()
    if "mse" in weights:
        loss = loss + weights["mse"] * ((1 - realism) * comparison.mse).mean()
    for name, distance in (("alex", comparison.alex), ("vgg", comparison.vgg)):
        if distance is not None:
            loss = loss + weights[name] * (realism * distance).mean()
    figures = {"l1": comparison.l1, "lpips": comparison.alex, "vgg": comparison.vgg}
    missing = torch.tensor(math.nan)
    means = {k: missing if v is None else v.detach().mean() for k, v in figures.items()}
    return loss, means
