"""Pictures to token maps: the first half of compressing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from percov2 import packing
from percov2.entropy.token_coder import TokenCoder
from percov2.images import check_size, pad, to_rgb
from percov2.models.backbone import Backbone
from percov2.models.model_config import Rate
from percov2.packing import Tokens

_CANDIDATES = 16
"""Nearest codes that a place may choose from."""


@dataclass(frozen=True)
class TokenChoice:
    """Which of nearly equally near codes a place takes: the likeliest.

    Attributes:
        coder: of the entropy model that will code the tokens.
        schedule: of the file.
        slack: how much less similar (cosine) than the nearest code a chosen one may be; it is one
            of the 16 nearest.
    """

    coder: TokenCoder
    schedule: str
    slack: float


def rgb_arrays(images: Sequence[Image.Image], max_pixels: int) -> list[NDArray[np.uint8]]:
    """Pictures of any modes as uint8 [H, W, 3] in sRGB; ValueError for one that is too large."""
    for image in images:
        check_size(image.width, image.height, max_pixels)
    return [to_rgb(image) for image in images]


def token_maps(
    model: Backbone,
    arrays: Sequence[NDArray[np.uint8]],
    rate: Rate,
    choice: TokenChoice | None = None,
) -> list[Tokens]:
    """Tokens int32 [h, w] of pictures uint8 [H, W, 3], padded to whole tokens.

    Without a choice every place takes the nearest code.
    """
    padded = [pad(array, rate.token_side) for array in arrays]

    def encode(group: list[NDArray[np.uint8]]) -> list[Tokens]:
        pixels = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2).float() / 127.5 - 1
        if choice is None:
            return list(model.encode_tokens(pixels, rate.name).cpu().numpy())
        tokens, similarities = model.candidates(pixels, rate.name, _CANDIDATES)
        allowed = similarities >= similarities[..., :1] - choice.slack
        return list(choice.coder.choose(tokens, allowed, choice.schedule).numpy())

    shapes = [array.shape for array in padded]
    sizes = [height * width // rate.token_side**2 for height, width, _ in shapes]
    return packing.by_group(padded, shapes, sizes, encode)
