"""A search by gradients for the tokens of one picture.

The hyper-encoder guesses tokens in one pass. Each round of the search paints the picture and moves
the directions before quantization along the gradient of L1 + LPIPS (AlexNet). Gradients pass
straight through the quantizer (cf. Yang, Bamler, Mandt 2020, arXiv 2006.04240). Files and decoders
do not change.
"""

from __future__ import annotations

from itertools import product
from math import gcd

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from percov2.models.backbone import Backbone
from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.models.tiny.torch.backbone import TinyTorchModel
from percov2.models.torch.perceptual import LPIPS
from percov2.models.windows import whole_patches

__all__ = ["L1_WEIGHT", "LEAST_SIDE", "LPIPS_WEIGHT", "TokenSearch", "tiles"]

L1_WEIGHT = 3.0
LPIPS_WEIGHT = 1.6
_STEP = 0.03
_SHIFTS = 16
"""AlexNet's last slices look at every 16th pixel. Each round shifts the picture by a new offset, as
in training, so that tokens cannot overfit one alignment."""
LEAST_SIDE = 32 + _SHIFTS - 1
_WINDOWS = 3
"""Least number of flow windows per tile and direction."""


def tiles(length: int, window: int, overlap: int, unit: int) -> list[slice]:
    """Split a side into tiles, which bound the memory of a search.

    A tile contains the same windows of the flow as the whole picture.

    ``length`` and the flow's ``window`` and ``overlap`` count latents, ``unit`` those per token.
    Tiles begin and end between tokens.
    """
    stride = window - overlap
    multiple = unit // gcd(stride, unit)
    step = stride * multiple * -(-_WINDOWS // multiple)
    starts = [s for s in range(0, length, step) if s == 0 or length - s >= window + overlap]
    margin = -(-overlap // unit) * unit
    ends = [start + margin for start in starts[1:]] + [length]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


class TokenSearch:
    """The search for one rate of a small model, deterministic on one machine.

    Raises ValueError for an unknown rate or a model of another backbone, and MetricWeightsMissing
    if LPIPS's weights are not installed.
    """

    def __init__(self, model: Backbone, rate: str, rounds: int) -> None:
        if not isinstance(model, TinyTorchModel):
            raise ValueError("only small models search for tokens; leave effort at 0")
        self.model, self.rate, self.rounds = model, rate, rounds
        self.unit = model.config.rate(rate).token_side // PatchAutoencoder.stride
        self.lpips = LPIPS("alex").to(model.device)

    def __call__(self, image: Tensor, caption: str) -> Tensor:
        """Return directions float32 [1, H/s, W/s, D] for an image and its caption, "" for none.

        The image is float [1, 3, H, W] in [-1, 1], its sides multiples of the token side. Raises
        ValueError for a side below 47 pixels, too few for AlexNet. The search assumes a decoder
        with one step and the default seed; other settings gain less.
        """
        height, width = image.shape[-2:]
        if min(height, width) < LEAST_SIDE:
            raise ValueError(
                f"{width}x{height} pixels are too few to search for tokens: make them {LEAST_SIDE} "
                "a side or more, or leave effort at 0"
            )
        image = image.to(self.model.device)
        realism = self.model.config.chosen_realism(self.rate, None)
        # A copy made outside inference mode can take part in gradients.
        directions = self.model.directions(image, self.rate).clone()
        with torch.no_grad():
            text = self.model.conditioning([caption], realism)
        stride, config = PatchAutoencoder.stride, self.model.config
        latents = height // stride, width // stride
        noise, grain = self.model.draw_noise(*latents, seed=0)
        grain = config.grain(self.rate, realism) * grain
        searched = torch.zeros(directions.shape[:-1], dtype=torch.bool, device=directions.device)
        windows = self.model.window_sides(self.rate, *latents)
        sides = [
            tiles(length, window, config.overlap, self.unit)
            for length, window in zip(latents, windows, strict=True)
        ]
        for ys, xs in product(*sides):
            both = [(s.start, s.stop) for s in (ys, xs)]
            places = (slice(None), *[slice(a // self.unit, b // self.unit) for a, b in both])
            down, across = (slice(a * stride, b * stride) for a, b in both)
            # Whole patches of the flow: the noise reaches beyond an odd tile.
            rows, columns = (slice(a, a + whole_patches(b - a, self.model.patch)) for a, b in both)
            noises = (noise[:, rows, columns], grain[:, rows, columns])
            tile = image[..., down, across]
            directions[places] = self._improve(
                directions[places], searched[places], tile, text, (*noises, windows)
            )
            searched[places] = True
        return directions

    def of_array(self, image: NDArray[np.float32], caption: str) -> NDArray[np.float32]:
        """Search for an array; arguments, result and errors as for a call."""
        return self(torch.from_numpy(image), caption).cpu().numpy()

    def _improve(
        self,
        directions: Tensor,
        fixed: Tensor,
        image: Tensor,
        text: tuple[Tensor, Tensor],
        start: tuple[Tensor, Tensor, tuple[int, int]],
    ) -> Tensor:
        """Return the directions of one tile after all rounds, unchanged where ``fixed`` is True."""
        quantizer = self.model.quantizer(self.rate)
        moved = directions.clone().requires_grad_()
        optimizer = torch.optim.Adam([moved], lr=_STEP, betas=(0.8, 0.95))
        generator = torch.Generator().manual_seed(0)
        shifts = torch.randint(_SHIFTS, (self.rounds, 2), generator=generator)
        for down, right in shifts.tolist():
            z_hat, _ = quantizer.straight_through(self._kept(directions, fixed, moved))
            z_hat = z_hat.repeat_interleave(self.unit, -2).repeat_interleave(self.unit, -1)
            painted = self.model.paint_once(z_hat, text, *start)
            lpips = self.lpips(painted[..., down:, right:], image[..., down:, right:]).mean()
            loss = L1_WEIGHT * (painted - image).abs().mean() + LPIPS_WEIGHT * lpips
            (moved.grad,) = torch.autograd.grad(loss, moved)
            optimizer.step()
        return self._kept(directions, fixed, moved).detach()

    @staticmethod
    def _kept(directions: Tensor, fixed: Tensor, moved: Tensor) -> Tensor:
        return torch.where(fixed[..., None], directions, F.normalize(moved, dim=-1))
