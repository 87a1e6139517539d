"""Measure a large picture: python benchmarks/big_image.py PICTURE [--side N] [--steps N] [--quick]

Crops or enlarges the picture to a square, compresses and restores it, and prints JSON: bytes,
seconds to decode with loaded networks, peak memory of the process, and the visibility of the
borders of sampling windows. This visibility is the mean absolute difference of neighbouring pixels
across borders, divided by that elsewhere; 1 is invisible. It is given for the restored picture, for
the original, and as their quotient. Fails if the restored picture has another size.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageOps

from percov2 import Codec
from percov2.images import read_image
from percov2.models.config import LATENT_SIDE
from percov2.models.tiny.backbone import window_sides
from percov2.models.windows import window_starts

_PATCH = 2
"""Latents per side of a patch of the flow of `tiny`."""


def border_places(side: int, window: int, overlap: int) -> NDArray[np.int64]:
    """Return the first pixels after the borders of all windows along one side of a picture."""
    starts = window_starts(side // LATENT_SIDE, window, window - overlap)
    edges = {LATENT_SIDE * place for start in starts for place in (start, start + window)}
    return np.array(sorted(edge for edge in edges if 0 < edge < side))


def border_ratio(picture: NDArray[np.uint8], places: NDArray[np.int64]) -> float:
    """Return the differences across columns and rows at ``places``, relative to all others."""
    across, elsewhere = [], []
    for pixels in (picture.astype(np.float64), picture.swapaxes(0, 1).astype(np.float64)):
        steps = np.abs(np.diff(pixels, axis=1)).mean((0, 2))
        at_border = np.isin(np.arange(1, len(steps) + 1), places)
        across.append(steps[at_border].mean())
        elsewhere.append(steps[~at_border].mean())
    return float(np.mean(across) / np.mean(elsewhere))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="image file")
    parser.add_argument("--side", type=int, default=2048, help="side in pixels (default: 2048)")
    parser.add_argument("--steps", type=int, help="flow evaluations (default: the rate's)")
    parser.add_argument("--rate", help="rate of the model (default: the model's)")
    parser.add_argument("--model", default="tiny", help="model name or folder (default: tiny)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--out", type=Path, help="file to write the restored picture to")
    parser.add_argument("--quick", action="store_true", help="use a side of 512 pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    side = 512 if arguments.quick else arguments.side
    image = ImageOps.fit(read_image(arguments.picture).convert("RGB"), (side, side))
    codec = Codec.from_pretrained(arguments.model)
    rate = codec.config.rate(arguments.rate or codec.config.default_rate)
    window, _ = window_sides(codec.config, rate.name, (side // LATENT_SIDE,) * 2, _PATCH)
    places = border_places(side, window, codec.config.overlap)
    if not len(places) or side % rate.token_side:
        raise SystemExit(f"{side} must be a multiple of the token side, and larger than a window")
    small = image.resize((64, 64))
    # The first call loads the networks.
    codec.decompress(codec.compress(small, rate=rate.name), steps=arguments.steps)
    file = codec.compress(image, rate=rate.name)
    started = time.perf_counter()
    restored = codec.decompress(file, steps=arguments.steps)
    seconds = time.perf_counter() - started
    if restored.size != image.size:
        raise SystemExit(f"restored {restored.size}, not {image.size}")
    if arguments.out:
        restored.save(arguments.out)
    ours, theirs = (border_ratio(np.asarray(x), places) for x in (restored, image))
    report = {
        "model": codec.config.name,
        "rate": rate.name,
        "side": side,
        "steps": arguments.steps or codec.config.default_steps(rate.name),
        "bytes": len(file),
        "decode_s": seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "borders": len(places),
        "border_ratio": ours,
        "border_ratio_original": theirs,
        "border_ratio_over_original": ours / theirs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
