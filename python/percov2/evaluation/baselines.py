"""Classical codecs at a given number of bytes, through Pillow.

At ultra-low rates they do best on a smaller picture that is enlarged again, so every scale of
``SCALES`` is tried at the best quality that fits, and the best of those is kept.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from percov2.evaluation.metrics import HIGHER_IS_BETTER, measure

SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)
LEVELS = 100
"""Qualities run from 0 to this."""


@dataclass(frozen=True)
class Attempt:
    """A picture after a codec.

    Attributes:
        restored: at the original's size.
        size: bytes of the file.
        scale: sides of the coded picture relative to the original.
        level: quality, 0..LEVELS.
    """

    restored: Image.Image
    size: int
    scale: float
    level: int


def _save(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def _jpeg(image: Image.Image, level: int) -> bytes:
    return _save(image, format="JPEG", quality=max(level, 1), optimize=True, progressive=True)


def _webp(image: Image.Image, level: int) -> bytes:
    return _save(image, format="WEBP", quality=level, method=6)


def _avif(image: Image.Image, level: int) -> bytes:
    return _save(image, format="AVIF", quality=level, speed=6)


def _jpeg2000(image: Image.Image, level: int) -> bytes:
    # From 1/4000 to 1/10 of the raw size, geometrically.
    ratio = 4000 ** (1 - level / LEVELS) * 10 ** (level / LEVELS)
    return _save(
        image,
        format="JPEG2000",
        quality_mode="rates",
        quality_layers=[ratio],
        irreversible=True,
        no_jp2=True,
    )


BASELINES: dict[str, Callable[[Image.Image, int], bytes]] = {
    "jpeg": _jpeg,
    "webp": _webp,
    "avif": _avif,
    "jpeg2000": _jpeg2000,
}
_FEATURES = {"jpeg": "jpg", "webp": "webp", "avif": "avif", "jpeg2000": "jpg_2000"}


def available(name: str) -> bool:
    """Whether this Pillow can write the format."""
    return bool(features.check(_FEATURES[name]))


def encode_within(name: str, image: Image.Image, size: int, metric: str = "psnr") -> Attempt | None:
    """The best picture that a codec makes of ``image`` (RGB) in at most ``size`` bytes.

    Args:
        name: one of ``BASELINES``.
        image: mode RGB.
        size: most bytes of the file.
        metric: decides between scales, one of ``metrics.METRICS``.

    Returns:
        None where no scale and quality fits, or this Pillow does not have the format.

    Raises:
        ValueError: an unknown name or metric.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; choose from {', '.join(BASELINES)}")
    if not available(name):
        return None
    best: tuple[float, Attempt] | None = None
    for scale in SCALES:
        attempt = _at_scale(name, image, size, scale)
        if attempt is None:
            continue
        value = measure(np.asarray(image), np.asarray(attempt.restored), [metric])[0][metric]
        if value is None:
            continue
        score = value if metric in HIGHER_IS_BETTER else -value
        if best is None or score > best[0]:
            best = (score, attempt)
    return None if best is None else best[1]


def _at_scale(name: str, image: Image.Image, size: int, scale: float) -> Attempt | None:
    """The best quality that fits at one scale, by bisection."""
    sides = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image if scale == 1 else image.resize(sides, Image.Resampling.LANCZOS)
    fitting: tuple[int, bytes] | None = None
    low, high = 0, LEVELS
    while low <= high:
        level = (low + high) // 2
        data = BASELINES[name](small, level)
        if len(data) <= size:
            fitting, low = (level, data), level + 1
        else:
            high = level - 1
    if fitting is None:
        return None
    level, data = fitting
    restored = Image.open(io.BytesIO(data)).convert("RGB")
    if restored.size != image.size:
        restored = restored.resize(image.size, Image.Resampling.LANCZOS)
    return Attempt(restored, len(data), scale, level)
