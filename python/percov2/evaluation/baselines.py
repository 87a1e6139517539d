"""Classical codecs at a given number of bytes: Pillow's, and VVC.

At ultra-low rates they do best on a smaller picture that is enlarged again, so every scale of
``SCALES`` is tried, at the best quality that fits.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from percov2.evaluation import vvc
from percov2.evaluation.metrics import HIGHER_IS_BETTER, METRICS, Original, measure

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


def _opened(data: bytes, size: tuple[int, int]) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@dataclass(frozen=True)
class Baseline:
    """A codec.

    Attributes:
        encode: picture (RGB) and quality 0 .. LEVELS -> file.
        decode: file and (width, height) -> picture.
        available: whether it works on this machine.
    """

    encode: Callable[[Image.Image, int], bytes]
    decode: Callable[[bytes, tuple[int, int]], Image.Image]
    available: Callable[[], bool]


def _pillow(encode: Callable[[Image.Image, int], bytes], feature: str) -> Baseline:
    return Baseline(encode, _opened, lambda: bool(features.check(feature)))


BASELINES: dict[str, Baseline] = {
    "jpeg": _pillow(_jpeg, "jpg"),
    "webp": _pillow(_webp, "webp"),
    "avif": _pillow(_avif, "avif"),
    "jpeg2000": _pillow(_jpeg2000, "jpg_2000"),
    "vvc": Baseline(vvc.encode, vvc.decode, vvc.available),
}


def attempts_within(name: str, image: Image.Image, size: int) -> list[Attempt]:
    """What a codec makes of ``image`` (RGB) in at most ``size`` bytes: one picture per scale.

    Empty where no scale and quality fits, or the codec is not available. Raises ValueError for a
    name that ``BASELINES`` does not have.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; choose from {', '.join(BASELINES)}")
    if not BASELINES[name].available():
        return []
    found = (_at_scale(BASELINES[name], image, size, scale) for scale in SCALES)
    return [attempt for attempt in found if attempt is not None]


def best_of(
    original: Original, attempts: list[Attempt], names: Sequence[str] = METRICS
) -> dict[str, tuple[float, Attempt]]:
    """The strongest attempt by each metric that has a value: name -> (value, attempt).

    So a codec may use another scale for each metric, which flatters it: no file has all the values.
    Of equals the first counts.
    """
    best: dict[str, tuple[float, Attempt]] = {}
    for attempt in attempts:
        values, _ = measure(original, np.asarray(attempt.restored), names)
        for metric, value in values.items():
            if value is None:
                continue
            sign = 1 if metric in HIGHER_IS_BETTER else -1
            if metric not in best or sign * value > sign * best[metric][0]:
                best[metric] = (value, attempt)
    return best


def _at_scale(baseline: Baseline, image: Image.Image, size: int, scale: float) -> Attempt | None:
    """The best quality that fits at one scale, by bisection."""
    sides = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image if scale == 1 else image.resize(sides, Image.Resampling.LANCZOS)
    fitting: tuple[int, bytes] | None = None
    low, high = 0, LEVELS
    while low <= high:
        level = (low + high) // 2
        data = baseline.encode(small, level)
        if len(data) <= size:
            fitting, low = (level, data), level + 1
        else:
            high = level - 1
    if fitting is None:
        return None
    level, data = fitting
    restored = baseline.decode(data, small.size)
    if restored.size != image.size:
        restored = restored.resize(image.size, Image.Resampling.LANCZOS)
    return Attempt(restored, len(data), scale, level)
