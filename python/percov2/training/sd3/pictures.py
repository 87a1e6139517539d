"""Validation of an SD3 run with restored pictures and their flow loss.

The pictures must not be among the training photos.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from percov2.images import to_rgb
from percov2.models.windows import sample
from percov2.photos import PHOTO_ENDINGS
from percov2.training.autoencoder_stage import save_rows
from percov2.training.sd3.frozen import FrozenNetworks
from percov2.training.sd3.networks import SD3Networks
from percov2.training.stage import append_row

__all__ = ["STEPS", "Pictures"]

STEPS = 20
_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Pictures:
    """Validation pictures, float [N, 3, S, S] in [-1, 1], and their captions.

    An empty caption means that the picture has none.
    """

    images: Tensor
    captions: list[str]

    @classmethod
    def load(cls, folder: Path, side: int, count: int = 4) -> Pictures:
        """Load the first ``count`` pictures of a folder, scaled and cropped to squares of ``side``.

        The file ``<name>.txt`` beside a picture holds its caption.

        Raises:
            ValueError: the folder contains no picture.
        """
        paths = sorted(p for p in folder.iterdir() if p.suffix[1:].lower() in PHOTO_ENDINGS)[:count]
        if not paths:
            raise ValueError(f"{folder} contains no picture ({', '.join(PHOTO_ENDINGS)})")
        arrays, captions = [], []
        for path in paths:
            with Image.open(path) as picture:
                rgb = Image.fromarray(to_rgb(picture))
            arrays.append(np.asarray(ImageOps.fit(rgb, (side, side), Image.Resampling.LANCZOS)))
            text = path.with_suffix(".txt")
            captions.append(text.read_text(encoding="utf-8").strip() if text.is_file() else "")
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        return cls(pixels.float() / 127.5 - 1, captions)

    @torch.no_grad()
    def restore(
        self, networks: SD3Networks, frozen: FrozenNetworks, folder: Path, step: int
    ) -> None:
        """Write ``samples/<step>.png`` and a line of ``validation.csv``.

        The rows of the picture are the originals, the one-step results and the 20-step results
        (without guidance).
        """
        device = frozen.device
        images = self.images.to(device)
        latents = frozen.latents(images)
        quantizer = networks.quantizer
        z_hat = quantizer.lookup(quantizer.tokens(networks.hyper_encoder(latents)))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
        text = frozen.text(self.captions)
        bf16 = networks.precision == "bf16"

        def velocity(noisy: Tensor, z_hat: Tensor, t: float) -> Tensor:
            times = torch.full((len(noisy),), t, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return networks.velocity(noisy, z_hat, times, text)

        def clean(noisy: Tensor, z_hat: Tensor, t: float) -> Tensor:
            return noisy - t * velocity(noisy, z_hat, t)

        errors = [
            (velocity((1 - t) * latents + t * noise, z_hat, t) - (noise - latents)).square().mean()
            for t in _TIMES
        ]
        flow = f"{float(torch.stack(errors).mean()):.5g}"
        append_row(folder / "validation.csv", {"step": step, "flow": flow})
        shift = networks.config.shift
        restored = [frozen.images(sample(clean, z_hat, noise, n, shift)) for n in (1, STEPS)]
        (folder / "samples").mkdir(exist_ok=True)
        save_rows(folder / "samples" / f"{step:07}.png", [images, *restored])
