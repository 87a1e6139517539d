"""Classical codecs at a given number of bytes: Pillow's codecs, JPEG XL, HEIC and VVC.

At ultra-low rates, the best result often comes from coding a smaller picture and enlarging it. So
every scale of ``SCALES`` is tried, at the highest quality that fits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, features

from percov2.evaluation import vvc
from percov2.evaluation.metrics import HIGHER_IS_BETTER, METRICS, Original, measure

__all__ = ["BASELINES", "Attempt", "Baseline", "attempts_within", "best_of"]

SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)
LEVELS = 100
"""The highest quality. The lowest is 0."""


@dataclass(frozen=True)
class Attempt:
    """A picture that a classical codec or a rival coded in ``size`` bytes and restored.

    ``restored`` has the size of the original. A classical codec coded a picture whose sides were
    ``scale`` times those of the original, at the quality ``level``.
    """

    restored: Image.Image
    size: int
    scale: float = 1.0
    level: int | None = None


@dataclass(frozen=True)
class Baseline:
    """The functions of a classical codec.

    ``encode`` takes a picture (RGB) and a quality 0..LEVELS. ``decode`` takes a file and the
    picture's (width, height). ``available`` returns True if the codec works on this machine.
    ``install`` is the command that installs it, and ``package`` the package that holds it.
    """

    encode: Callable[[Image.Image, int], bytes]
    decode: Callable[[bytes, tuple[int, int]], Image.Image]
    available: Callable[[], bool]
    install: str
    package: str = "pillow"


def _pillow(form: str, feature: str, options: Callable[[int], dict[str, Any]]) -> Baseline:
    """Return a codec of Pillow. ``options`` maps a quality to options of ``Image.save``."""

    def encode(image: Image.Image, level: int) -> bytes:
        stream = io.BytesIO()
        image.save(stream, format=form, **options(level))
        return stream.getvalue()

    def decode(data: bytes, size: tuple[int, int]) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    install = "pip install --upgrade pillow"
    return Baseline(encode, decode, lambda: bool(features.check(feature)), install)


def _jpeg2000(level: int) -> dict[str, Any]:
    # Geometric steps from 1/4000 to 1/10 of the raw size.
    ratio = 4000 ** (1 - level / LEVELS) * 10 ** (level / LEVELS)
    layers = {"quality_mode": "rates", "quality_layers": [ratio]}
    return {**layers, "irreversible": True, "no_jp2": True}


_BEST_LOSSY_JPEGXL = 99
"""The plugin refuses 100 without its option for lossless files."""


def _encode_jpegxl(image: Image.Image, level: int) -> bytes:
    import_module("pillow_jxl")  # adds the format to Pillow
    stream = io.BytesIO()
    image.save(stream, format="JXL", quality=min(level, _BEST_LOSSY_JPEGXL))
    return stream.getvalue()


def _decode_jpegxl(data: bytes, size: tuple[int, int]) -> Image.Image:
    import_module("pillow_jxl")
    return Image.open(io.BytesIO(data), formats=["JXL"]).convert("RGB")


def _encode_heic(image: Image.Image, level: int) -> bytes:
    stream = io.BytesIO()
    import_module("pillow_heif").from_pillow(image).save(stream, quality=level)
    return stream.getvalue()


def _decode_heic(data: bytes, size: tuple[int, int]) -> Image.Image:
    restored: Image.Image = import_module("pillow_heif").open_heif(io.BytesIO(data)).to_pillow()
    return restored.convert("RGB")


def _has_heic() -> bool:
    if find_spec("pillow_heif") is None:
        return False
    return bool(import_module("pillow_heif").libheif_info()["HEIF"])


BASELINES: dict[str, Baseline] = {
    "jpeg": _pillow(
        "JPEG", "jpg", lambda q: {"quality": max(q, 1), "optimize": True, "progressive": True}
    ),
    "webp": _pillow("WEBP", "webp", lambda q: {"quality": q, "method": 6}),
    "avif": _pillow("AVIF", "avif", lambda q: {"quality": q, "speed": 6}),
    "jpeg2000": _pillow("JPEG2000", "jpg_2000", _jpeg2000),
    "jpegxl": Baseline(
        _encode_jpegxl,
        _decode_jpegxl,
        lambda: find_spec("pillow_jxl") is not None,
        "pip install pillow-jxl-plugin",
        "pillow-jxl-plugin",
    ),
    "heic": Baseline(
        _encode_heic, _decode_heic, _has_heic, "pip install 'percov2[heif]'", "pillow-heif"
    ),
    "vvc": Baseline(
        vvc.encode, vvc.decode, vvc.available, "pip install imageio-ffmpeg", "imageio-ffmpeg"
    ),
}


def attempts_within(name: str, image: Image.Image, size: int) -> list[Attempt]:
    """Code ``image`` (RGB) in at most ``size`` bytes. Return one attempt for each scale that fits.

    The list is empty if no scale fits or the codec is not available. Raises ValueError for a name
    that is not in ``BASELINES``.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; choose from {', '.join(BASELINES)}")
    scales = SCALES if BASELINES[name].available() else ()
    found = (_at_scale(BASELINES[name], image, size, scale) for scale in scales)
    return [attempt for attempt in found if attempt is not None]


def best_of(
    original: Original, attempts: list[Attempt], names: Sequence[str] = METRICS
) -> dict[str, tuple[float, Attempt]]:
    """Return, for each metric with a value, the best value and the first attempt that has it.

    Different metrics may choose different scales. This favours the classical codec, because no
    single file has all the best values.
    """
    best: dict[str, tuple[float, Attempt]] = {}
    for attempt in attempts:
        values, _ = measure(original, np.asarray(attempt.restored), names)
        for metric, value in values.items():
            sign = 1 if metric in HIGHER_IS_BETTER else -1
            if value is not None and sign * value > sign * best.get(metric, (-sign * math.inf,))[0]:
                best[metric] = (value, attempt)
    return best


def _at_scale(baseline: Baseline, image: Image.Image, size: int, scale: float) -> Attempt | None:
    """Find the highest quality that fits at one scale, by bisection."""
    sides = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image if scale == 1 else image.resize(sides, Image.Resampling.LANCZOS)
    best: tuple[int, bytes] | None = None
    low, high = 0, LEVELS
    while low <= high:
        level = (low + high) // 2
        data = baseline.encode(small, level)
        if len(data) <= size:
            best, low = (level, data), level + 1
        else:
            high = level - 1
    if best is None:
        return None
    restored = baseline.decode(best[1], small.size)
    if restored.size != image.size:
        restored = restored.resize(image.size, Image.Resampling.LANCZOS)
    return Attempt(restored, len(best[1]), scale, best[0])
