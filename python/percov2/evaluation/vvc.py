"""VVC (H.266) stills with libvvenc and ffmpeg's decoder, from the package imageio-ffmpeg."""

from __future__ import annotations

import importlib.util
import subprocess
from functools import lru_cache

import numpy as np
from PIL import Image

__all__ = ["available", "decode", "encode"]

_GRAIN, _LEAST_SIDE = 8, 32
"""Sides are padded to multiples of 8 and to at least 32. The decoder is given the true size."""
_WORST_QP, _BEST_QP = 63, 16
"""libvvenc's buffer is too small for noise at lower QPs."""


def available() -> bool:
    """Return True if imageio-ffmpeg is installed and its ffmpeg supports VVC."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None and "libvvenc" in _codecs()


@lru_cache(maxsize=1)
def _codecs() -> str:
    return _run(["-codecs"], b"").decode(errors="replace")


def _run(options: list[str], given: bytes) -> bytes:
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", *options]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ffmpeg failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _padded(size: tuple[int, int]) -> tuple[int, int]:
    width, height = (max(_LEAST_SIDE, -(-side // _GRAIN) * _GRAIN) for side in size)
    return width, height


def encode(image: Image.Image, level: int) -> bytes:
    """Encode a picture (RGB) as a raw VVC stream with preset medium, 4:2:0 and 10 bits.

    The quality ``level``, 0..100, maps to QP 63..16. Raises RuntimeError if ffmpeg fails.
    """
    width, height = _padded(image.size)
    margin = ((0, height - image.height), (0, width - image.width), (0, 0))
    raw = np.pad(np.asarray(image), margin, mode="edge").tobytes()
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-i", "-"]
    qp = round(_WORST_QP + (_BEST_QP - _WORST_QP) * level / 100)
    coding = ["-c:v", "libvvenc", "-preset", "medium", "-qp", str(qp), "-pix_fmt", "yuv420p10le"]
    return _run([*source, "-frames:v", "1", *coding, "-f", "vvc", "-"], raw)


def decode(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Decode a stream of ``encode``. ``size`` is the (width, height) of the encoded picture."""
    width, height = _padded(size)
    target = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    # With several threads, ffmpeg 9.0 sometimes returns a damaged first picture.
    raw = _run(["-threads", "1", "-f", "vvc", "-i", "-", "-frames:v", "1", *target], data)
    pixels = np.frombuffer(raw, np.uint8).reshape(height, width, 3)
    return Image.fromarray(pixels[: size[1], : size[0]].copy())
