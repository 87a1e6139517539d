"""Losses of the joint phase: what they weigh, what they see, and how realism shifts them.

A sample of realism β costs

    L1 + (1 − β)·mse·MSE + β·(alex·LPIPS(AlexNet) + vgg·LPIPS(VGG16) + adversaries),

so that one model learns the whole range from a faithful picture to a realistic one, as in
Multi-Realism Image Compression (Agustsson et al. 2023, arXiv 2212.13824) and CRDR (Iwai et al.
2024, arXiv 2306.01150).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from percov2.models.perceptual import LPIPS

_STRIDE = 16
"""Of the last slices of AlexNet and VGG16."""
_LEAST_SIDE = 32


@dataclass(frozen=True)
class Term:
    """The weight of a loss over the steps of a run.

    Attributes:
        weight: at last.
        from_step: step before which it is 0.
        warmup: steps over which it rises linearly, counted from ``from_step``.

    Raises:
        ValueError: a value below 0.
    """

    weight: float = 0.0
    from_step: int = 0
    warmup: int = 0

    def __post_init__(self) -> None:
        if not min(self.weight, self.from_step, self.warmup) >= 0:
            raise ValueError(f"weight, from_step and warmup must not be negative: {self}")

    def at(self, step: int) -> float:
        """Return the weight at a step."""
        done = step - self.from_step
        return 0.0 if done < 0 else self.weight * min(1.0, (done + 1) / (self.warmup + 1))


@dataclass(frozen=True)
class LossTerms:
    """Weights of the losses at one rate, beside 1 for L1.

    Attributes:
        mse: of the mean squared error, at realism 0.
        alex: of LPIPS (AlexNet).
        vgg: of LPIPS (VGG16).
        pixels: force of the discriminator of pixels: the root mean square of its gradient at the
            picture, as a multiple of that of L1.
        features: of the hinge loss of the discriminator of features.
    """

    mse: Term = field(default_factory=Term)
    alex: Term = field(default_factory=Term)
    vgg: Term = field(default_factory=Term)
    pixels: Term = field(default_factory=Term)
    features: Term = field(default_factory=Term)

    def at(self, step: int) -> dict[str, float]:
        """Return the weights that are not 0 at a step, by name."""
        weights = {term.name: getattr(self, term.name).at(step) for term in fields(self)}
        return {name: weight for name, weight in weights.items() if weight}

    def named(self) -> list[str]:
        """Return the names of the terms that are not 0 at some step."""
        return [term.name for term in fields(self) if getattr(self, term.name).weight]


def _cut(images: Tensor, corner: Tensor, height: int, width: int) -> Tensor:
    """Return the part of images [B, 3, H, W] of this size, from row and column ``corner`` on."""
    # Not by slices: a recorded step that is repeated must find its new corner on the device.
    rows = corner[0] + torch.arange(height, device=corner.device)
    columns = corner[1] + torch.arange(width, device=corner.device)
    return images.index_select(-2, rows).index_select(-1, columns)


def least_side(coarse: bool) -> int:
    """Return the pixels a side below which AlexNet may see nothing, of halved pictures if so."""
    return _LEAST_SIDE * (2 if coarse else 1) + _STRIDE - 1


@dataclass(frozen=True)
class View:
    """What the perceptual networks see of a batch.

    AlexNet's slices look at every 4th, 8th and 16th pixel, the decoder paints blocks of 4×4 and the
    flow such of 16×16. At a fixed place both learn patterns of these periods that please one
    network alone. So pictures are cut at a place that is drawn for every batch.

    Attributes:
        shift: row and column int64 [2], 0 to 15, of the first pixel that AlexNet sees; None for
            whole pictures.
        window: row and column int64 [2] of the first pixel of the window that VGG16 sees.
        window_side: side of that window in pixels.
        coarse: whether AlexNet sees means of 2×2 pixels.
    """

    shift: Tensor | None
    window: Tensor
    window_side: int
    coarse: bool = False


def _drawn(share: float) -> bool:
    """Return whether a call belongs to a share of all; draw nothing where the share is 0 or 1."""
    return share >= 1 or (share > 0 and float(torch.rand(())) < share)


def draw_view(side: int, aligned: float, coarse: float, window_side: int) -> View:
    """Draw the view of a batch of crops.

    Args:
        side: of the crops, in pixels.
        aligned: share of the calls in which AlexNet sees whole pictures.
        coarse: share of the calls in which it sees means of 2×2 pixels.
        window_side: most pixels a side that VGG16, the costliest network by far, sees.
    """
    shift = None if _drawn(aligned) else torch.randint(_STRIDE, (2,))
    # Whole pictures, too, are cut, so that VGG16 meets every phase of its strides.
    window_side = min(window_side, side - _STRIDE + 1)
    window = torch.randint(side - window_side + 1, (2,))
    return View(shift, window, window_side, _drawn(coarse))


@dataclass(frozen=True)
class Comparison:
    """What a batch's losses are made of.

    Attributes:
        l1, mse, alex, vgg: one value per sample, float [B]; None for what has no weight.
        found, wanted: responses of frozen networks to the pictures and to the photos, where the
            discriminator of features needs them.
    """

    l1: Tensor
    mse: Tensor
    alex: Tensor | None
    vgg: Tensor | None
    found: list[Tensor]
    wanted: list[Tensor]


FEATURES = (("alex", 2), ("vgg", 1), ("vgg", 2), ("vgg", 3))
"""Network and slice, from 0, of the responses that the discriminator of features judges: AlexNet at
1/16, VGG16 at 1/2, 1/4 and 1/8 of the resolution."""
FEATURE_CHANNELS = (384, 128, 256, 512)


class PerceptualNetworks(nn.Module):
    """The frozen networks of the losses, each run once per batch and picture.

    EfficientNet-Lite0 is the judge of realism and never among them, nor is DISTS.

    Args:
        names: which of "alex" and "vgg".

    Raises:
        MetricWeightsMissing: when their weights are not installed.
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
            active: names of the terms that have a weight (``LossTerms.at``).

        Raises:
            ValueError: pictures of less than 47 pixels a side (79 where the view is coarse), of
                which AlexNet sees nothing.
        """
        least = least_side(view.coarse)
        if min(images.shape[-2:]) < least:
            raise ValueError(
                f"crops of {images.shape[-1]}x{images.shape[-2]} are too small for LPIPS; make "
                f"them {least} pixels a side or more"
            )
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
                distances[name] = network.distance(
                    network.normalized(found[name]), network.normalized(wanted[name])
                )
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
    """Return what a network sees of images."""
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
        realism: β of every sample, float [B] in [0, 1].
        weights: of the terms, scalars.

    Returns:
        The loss, and l1, lpips (AlexNet) and vgg: means over the batch, NaN for what was not
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
