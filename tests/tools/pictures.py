"""Pictures of random pixels, and pictures as networks take them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def noise(width: int, height: int, seed: int = 0, block: int = 1) -> Image.Image:
    """Random blocks of ``block`` pixels a side."""
    shape = (height // block, width // block, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Image.fromarray(pixels.repeat(block, 0).repeat(block, 1))


def tensor(image: Image.Image) -> torch.Tensor:
    """float [1, 3, H, W] in -1 ... 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
