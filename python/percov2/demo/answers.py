"""What the web page answers, without the page: pictures, files and the sentences about them."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from percov2.codec import Codec
from percov2.container.bitstream import BitstreamError
from percov2.evaluation.baselines import BASELINES, attempts_within, best_of
from percov2.evaluation.metrics import Original
from percov2.images import decode_image, to_rgb
from percov2.options import DecodeOptions, EncodeOptions

__all__ = ["MOST_PIXELS", "Answer", "Answers"]

MOST_PIXELS = 16_000_000
"""Default limit of a picture's pixels. Larger ones occupy the page for a minute."""
RIVALS = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF"}
"""Codecs to compare with, and their titles."""


@dataclass(frozen=True)
class Answer:
    """A restored picture, what it was, and a sentence about it.

    Attributes:
        restored: the restored picture.
        sentence: bytes, bits per pixel and other facts, as Markdown.
        file: the ``.pcv2`` file.
        original: the photo, or None if only the file is known.
    """

    restored: Image.Image
    sentence: str
    file: bytes
    original: Image.Image | None = None


class Answers:
    """The requests that the page makes to one codec.

    Args:
        codec: the codec.
        most_pixels: largest accepted number of pixels.
    """

    def __init__(self, codec: Codec, most_pixels: int = MOST_PIXELS) -> None:
        self.codec, self.most_pixels = codec, most_pixels

    @property
    def rates(self) -> list[str]:
        """Return the names of the model's rates."""
        return [rate.name for rate in self.codec.config.rates]

    @property
    def has_dial(self) -> bool:
        """Return True if the model's realism can be chosen."""
        return self.codec.config.realism is not None

    def photo(self, data: bytes) -> Image.Image:
        """Return an image file's picture in mode RGB.

        Raises ValueError for no picture, a damaged one or one of too many pixels.
        """
        picture = decode_image(io.BytesIO(data), self.most_pixels)
        return Image.fromarray(to_rgb(picture))

    def compress(
        self,
        photo: bytes,
        rate: str | None = None,
        target_bytes: int | None = None,
        realism: float | None = None,
    ) -> Answer:
        """Compress an image file, and restore it from the file that this makes.

        Raises ValueError for no picture, a damaged or too large one, or invalid options.
        """
        original = self.photo(photo)
        options = EncodeOptions(rate=rate, target_bytes=target_bytes, max_pixels=self.most_pixels)
        file = self.codec.compress(original, options)
        answer = self.restore(file, realism)
        factor = 3 * original.width * original.height / len(file)
        sentence = f"{answer.sentence}, 1 : {factor:,.0f} of the raw pixels"
        return Answer(answer.restored, sentence, file, original)

    def restore(self, file: bytes, realism: float | None = None) -> Answer:
        """Restore the picture of a ``.pcv2`` file, also of one whose end is missing.

        Raises ValueError for another file, a damaged one, or too large a picture.
        """
        options = DecodeOptions(realism=realism, max_pixels=self.most_pixels)
        fault = ""
        try:
            (decoded,) = self.codec.decode([file], options)
        except BitstreamError as error:
            options = replace(options, allow_truncated=True)
            (decoded,) = self.codec.decode([file], options)
            fault = f"; **{error}**"
        (restored,) = self.codec.paint([decoded], options)
        pixels = restored.width * restored.height
        sentence = (
            f"**{len(file):,} bytes**, {8 * len(file) / pixels:.4f} bpp, "
            f"{restored.width}×{restored.height} pixels, rate {decoded.rate.name}{fault}"
        )
        if decoded.stages < decoded.stage_count:
            sentence += (
                f"; {decoded.stages} of {decoded.stage_count} stages are from the file, "
                "and the model drew the others"
            )
        if decoded.caption:
            sentence += f"; caption “{decoded.caption}”"
        return Answer(restored, sentence, file)

    def rivals(self, photo: bytes, size: int) -> list[tuple[Image.Image, str]]:
        """Return a photo as JPEG, WebP and AVIF in at most ``size`` bytes, each with a title.

        Each codec has the scale of the highest PSNR. One that needs more bytes, or that this
        machine lacks, shows as a grey picture.
        """
        original = self.photo(photo)
        pictures = []
        for name, title in RIVALS.items():
            attempts = attempts_within(name, original, size)
            best = best_of(Original(np.asarray(original)), attempts, ["psnr"]).get("psnr")
            if best is None:
                why = "needs more bytes" if BASELINES[name].available() else "is not installed"
                pictures.append((Image.new("RGB", original.size, "gray"), f"{title} {why}"))
            else:
                pictures.append((best[1].restored, f"{title}, {best[1].size:,} bytes"))
        return pictures
