"""Draw docs/images/coffee.jpg: a photo, percov2's copy, the best classical codec's copy.

The photo is scikit-image's coffee.png (CC0, Rachel Michetti). The best classical codec has the
lowest LPIPS (VGG) at no more bytes than percov2; each may shrink the picture first. Run from a
checkout with the extra ``eval`` and the metrics' weights: ``python docs/draw_readme_picture.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.data import coffee

from percov2 import Codec
from percov2.evaluation.baselines import BASELINES, attempts_within, best_of
from percov2.evaluation.metrics import Original, measure

PATH = Path(__file__).parent / "images" / "coffee.jpg"
METRIC = "lpips_vgg"
GAP, TEXT, STRIP = 8, 22, 34
"""Pixels between pictures, of a letter's height and of the labels' strip."""


def cells() -> list[tuple[str, Image.Image]]:
    """Return the labels and the pictures, left to right."""
    photo = Image.fromarray(coffee())
    original = Original(np.asarray(photo))
    codec = Codec.from_pretrained("tiny")
    data = codec.compress(photo)
    ours = codec.decompress(data)
    found = {
        name: best_of(original, attempts_within(name, photo, len(data)), (METRIC,))
        for name in BASELINES
    }
    fitting = {name: best[METRIC] for name, best in found.items() if METRIC in best}
    for name, (value, attempt) in fitting.items():
        print(f"{name}: {attempt.size} bytes, {METRIC} {value:.3f}, scale {attempt.scale}")
    value = measure(original, np.asarray(ours), (METRIC,))[0][METRIC]
    print(f"percov2: {len(data)} bytes, {METRIC} {value:.3f}")
    name, (_, attempt) = min(fitting.items(), key=lambda one: one[1][0])
    return [
        ("original", photo),
        (f"percov2: {len(data)} bytes", ours),
        (f"{name.upper()}, the best classical codec: {attempt.size} bytes", attempt.restored),
    ]


def draw() -> None:
    """Write the pictures side by side, each under its label."""
    row = cells()
    width, height = row[0][1].size
    page = Image.new("RGB", (len(row) * (width + GAP) - GAP, height + STRIP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for place, (label, picture) in enumerate(row):
        left = place * (width + GAP)
        pen.text((left, (STRIP - TEXT) // 2 - 2), label, "black", font)
        page.paste(picture, (left, STRIP))
    page.save(PATH, quality=88, optimize=True, progressive=True)


if __name__ == "__main__":
    draw()
