"""Reconstruction losses of stage 1, with real gradients through the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from percov2.models.perceptual import LPIPS

_WINDOW = 64
"""Side of the windows, in pixels, in which textures are compared."""
_STRIDE = 16
"""Of AlexNet's last three slices."""
_ALEXNET_SIDE = 32


def _shifted(images: Tensor, shift: Tensor) -> Tensor:
    """Images [B, 3, H, W] cut to H - 15 and W - 15, from row and column ``shift`` on."""
    height, width = (side - _STRIDE + 1 for side in images.shape[-2:])
    # Not by slices: a recorded step that is repeated must find its new shift on the device.
    rows = shift[0] + torch.arange(height, device=shift.device)
    columns = shift[1] + torch.arange(width, device=shift.device)
    return images.index_select(-2, rows).index_select(-1, columns)


def randomly_shifted(*images: Tensor) -> list[Tensor]:
    """Images [B, 3, H, W] cut to H - 15 and W - 15, at a place that is drawn once for all of them.

    AlexNet's slices look at every 4th, 8th and 16th pixel, the decoder paints blocks of 4×4 and the
    flow such of 16×16. At a fixed place both learn patterns of these periods that please this
    network alone, because it meets them at one phase only.
    """
    shift = torch.randint(_STRIDE, (2,))
    return [_shifted(x, shift) for x in images]


def _drawn(share: float) -> bool:
    """Whether a call belongs to a share of all; draws nothing where the share is 0 or 1."""
    return share >= 1 or (share > 0 and float(torch.rand(())) < share)


def least_side(coarse: bool) -> int:
    """Pixels a side below which AlexNet may see nothing of a picture, halved if ``coarse``."""
    return _ALEXNET_SIDE * (2 if coarse else 1) + _STRIDE - 1


@dataclass(frozen=True)
class View:
    """What LPIPS and texture see of a batch.

    Attributes:
        shift: row and column int64 [2], 0 to 15, at which pictures are cut as by
            :func:`randomly_shifted`; None for whole pictures.
        coarse: whether they see means of 2×2 pixels.
    """

    shift: Tensor | None
    coarse: bool


def draw_view(aligned: float, coarse: float) -> View:
    """A view without a shift in a share ``aligned`` of the calls, coarse in a share ``coarse``."""
    shift = None if _drawn(aligned) else torch.randint(_STRIDE, (2,))
    return View(shift, _drawn(coarse))


def _spread(maps: Tensor, windows: tuple[int, int]) -> Tensor:
    """Standard deviations [B, C, *windows] in windows that together cover the maps."""
    mean = F.adaptive_avg_pool2d(maps, windows)
    variance = F.adaptive_avg_pool2d(maps.square(), windows) - mean.square()
    return variance.clamp_min(0).add(1e-3).sqrt()


def _slopes(images: Tensor) -> Tensor:
    """Differences of neighbouring pixels, right and down: [B, 6, H - 1, W - 1]."""
    here = images[..., :-1, :-1]
    return torch.cat([images[..., :-1, 1:] - here, images[..., 1:, :-1] - here], 1)


def texture_distance(maps: list[Tensor], references: list[Tensor], size: tuple[int, int]) -> Tensor:
    """How much local contrast differs: 0 where it is equal, toward 1 where one of both has none.

    In windows of about 64 pixels, per map, Σ(s - r)² / Σ(s² + r²) over channels, s and r being
    standard deviations; the mean over windows and maps. Texture in the wrong places of a window
    costs nothing, a blurred one does.

    Args:
        maps: feature maps [B, C, h, w] of the pictures, at any resolution.
        references: those of the photos.
        size: height and width of the pictures, in pixels.
    """
    rows, columns = (max(1, round(side / _WINDOW)) for side in size)
    distances = []
    for x, y in zip(maps, references, strict=True):
        windows = min(rows, x.shape[-2]), min(columns, x.shape[-1])
        ours, theirs = _spread(x.float(), windows), _spread(y.float(), windows)
        power = (ours.square() + theirs.square()).sum(1)
        distances.append(((ours - theirs).square().sum(1) / power).mean())
    return torch.stack(distances).mean()


class ReconstructionLoss(nn.Module):
    """L1 + LPIPS (AlexNet) + texture of decoded images against the photos.

    LPIPS and texture see a :class:`View` of the pictures. Without a shift they see them as a
    viewer's LPIPS does, from the first pixel of a token on; where a view is coarse, what is finer
    is left to the other losses.

    LPIPS-VGG and DISTS are kept for judging and are never training losses.

    Args:
        lpips_weight: of LPIPS, beside 1 for L1.
        texture_weight: of :func:`texture_distance` on AlexNet's responses and pixel differences.
    """

    def __init__(self, lpips_weight: float, texture_weight: float = 0.0) -> None:
        super().__init__()
        self.lpips_weight, self.texture_weight = lpips_weight, texture_weight
        self.lpips = LPIPS("alex")

    def forward(
        self,
        images: Tensor,
        references: Tensor,
        view: View,
        lpips_weight: float | None = None,
        texture_weight: float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts (texture NaN if it has no weight); both [B, 3, H, W] in [-1, 1].

        ``lpips_weight`` and ``texture_weight`` replace the module's for this call.

        Raises:
            ValueError: pictures of less than 47 pixels a side (79 where the view is coarse), of
                which AlexNet sees nothing.
        """
        lpips_weight = self.lpips_weight if lpips_weight is None else lpips_weight
        texture_weight = self.texture_weight if texture_weight is None else texture_weight
        least = least_side(view.coarse)
        if min(images.shape[-2:]) < least:
            raise ValueError(
                f"crops of {images.shape[-1]}x{images.shape[-2]} are too small for LPIPS; make "
                f"them {least} pixels a side or more"
            )
        l1 = (images.float() - references).abs().mean()
        if view.shift is not None:
            images, references = (_shifted(x, view.shift) for x in (images, references))
        if view.coarse:
            images, references = (F.avg_pool2d(x, 2) for x in (images, references))
        with torch.no_grad():
            wanted = self.lpips.responses(references)
            target = self.lpips.normalized(wanted)
        found = self.lpips.responses(images)
        lpips = self.lpips.distance(self.lpips.normalized(found), target).mean()
        loss = l1 + lpips_weight * lpips
        figures = {"l1": l1.detach(), "lpips": lpips.detach(), "texture": torch.tensor(math.nan)}
        if texture_weight:
            texture = texture_distance(
                [_slopes(images.float()), *found],
                [_slopes(references), *wanted],
                (images.shape[-2], images.shape[-1]),
            )
            loss = loss + texture_weight * texture
            figures["texture"] = texture.detach()
        return loss, figures
