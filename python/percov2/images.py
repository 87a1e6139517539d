"""Pictures of any kind <-> 8-bit sRGB arrays, and padding to whole tokens.

Everything that a file may say about how its numbers are meant is applied here, once: EXIF
orientation, ICC profile, transparency, palette, CMYK, 16 bits.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from percov2.bitstream import MAX_PIXELS, MAX_SIDE

_DIRECT = ("L", "RGB", "CMYK")
"""Modes that colour management reads as they are."""
_PROFILE_SPACE = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


class ImageWarning(UserWarning):
    """Something in a picture was left out or replaced on the way to sRGB."""


def read_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture file and decode it completely (the first frame of an animation).

    Args:
        path: a file in any format that Pillow reads.
        max_pixels: refuse pictures with more pixels, before decoding them.

    Returns:
        The picture as stored; ``to_rgb`` makes it sRGB.

    Raises:
        ValueError: not a picture, truncated or damaged, or too large.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as stream:
        data = stream.read()
    try:
        with warnings.catch_warnings():
            # Pillow's own guard warns below our limit; ours is the one that decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            check_size(image.width, image.height, max_pixels)
            image.load()
    except UnidentifiedImageError:
        raise ValueError("not a picture in a format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"refused to decode the picture: {error}") from None
    except ImageSizeError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise ValueError(f"the picture is truncated or damaged: {error}") from error
    return image


class ImageSizeError(ValueError):
    """A picture has more pixels, or a longer side, than the codec takes."""


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageSizeError for pictures that a file cannot hold or that exceed the limit."""
    if width < 1 or height < 1:
        raise ImageSizeError(f"the picture is {width}x{height}; it has no pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageSizeError(f"the picture is {width}x{height}; a side has at most {MAX_SIDE}")
    if width * height > max_pixels:
        raise ImageSizeError(
            f"the picture is {width}x{height} = {width * height} pixels, more than the limit of "
            f"{max_pixels}; scale it down, or raise the limit with --max-pixels"
        )


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """A picture of any mode as sRGB, uint8 [H, W, 3].

    Orientation is applied, profiles are converted to sRGB (relative colorimetric with black point
    compensation), transparency is flattened on white, 16-bit grey is rounded to 8 bits.

    Warns:
        ImageWarning: transparency was flattened, or a damaged or unfitting profile or orientation
            was ignored.

    Raises:
        ValueError: numbers outside the range that the mode implies.
    """
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged EXIF block is no reason to refuse the picture
        _warn(f"ignored a damaged EXIF block ({error})")
    profile = image.info.get("icc_profile")
    colour, alpha = _split_alpha(_to_eight_bits(image))
    rgb = _to_srgb(colour, profile)
    if alpha is not None and np.asarray(alpha).min() < 255:
        _warn("transparency was flattened on white; it is not stored")
        white = Image.new("RGB", rgb.size, "white")
        rgb = Image.composite(rgb, white, alpha)
    return np.array(rgb, dtype=np.uint8)


def _warn(message: str) -> None:
    warnings.warn(message, ImageWarning, stacklevel=3)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Modes with more than 8 bits as "L"; other modes as they are."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow gives 16-bit grey as I;16 or I. 65535 is white whatever the picture's maximum.
        values = np.array(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"grey values {low} to {high}; integer pictures must be 0 to 65535")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        numbers = np.array(image, dtype=np.float64)
        if not (np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() <= 1):
            raise ValueError("a floating-point picture must have finite values from 0 to 1")
        return Image.fromarray(np.rint(numbers * 255).astype(np.uint8))
    return image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in one of ``_DIRECT`` (or "LAB"), and transparency "L" where there is any."""
    if image.mode == "PA" or "transparency" in image.info or image.mode in ("RGBa", "La"):
        image = image.convert({"La": "LA"}.get(image.mode, "RGBA"))
    if image.mode in ("RGBA", "LA"):
        alpha = image.getchannel("A")
        if image.mode == "LA":
            return image.getchannel("L"), alpha
        return Image.merge("RGB", image.split()[:3]), alpha
    if image.mode == "1":
        return image.convert("L"), None
    if image.mode in _DIRECT or image.mode == "LAB":
        return image, None
    return image.convert("RGB"), None


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours of mode L, RGB, CMYK or LAB as sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return _converted(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            if space == "RGB" and image.mode == "L":
                image = image.convert("RGB")  # greys of a colour picture
            if space != _PROFILE_SPACE[image.mode]:
                raise ImageCms.PyCMSError(f"a {space} profile in a {image.mode} picture")
            transform = ImageCms.buildTransform(
                source,
                srgb,
                image.mode,
                "RGB",
                ImageCms.Intent.RELATIVE_COLORIMETRIC,
                ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            return _converted(image, transform)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            _warn(f"ignored a damaged or unfitting colour profile ({error})")
    return image.convert("RGB")


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None  # only in-place conversion gives nothing
    return result


def reflected(length: int, padded: int) -> NDArray[np.int64]:
    """Source index of each of ``padded`` samples when ``length`` samples are reflected.

    The last sample is not repeated (… n-2, n-1, n-2 …); where one reflection is not enough the
    picture swings back and forth; a single sample is repeated.
    """
    if length == 1:
        return np.zeros(padded, dtype=np.int64)
    swing = np.arange(padded, dtype=np.int64) % (2 * (length - 1))
    return np.minimum(swing, 2 * (length - 1) - swing)


def pad(rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Extend uint8 [H, W, 3] by reflection at the bottom and right to multiples of ``side``."""
    height, width = rgb.shape[:2]
    rows = reflected(height, -(-height // side) * side)
    columns = reflected(width, -(-width // side) * side)
    return rgb[rows][:, columns]


def picture_format(path: Path | str) -> str:
    """Pillow's name of the format that a file name ends in.

    Raises ValueError for an ending that names no format which Pillow writes.
    """
    suffix = Path(path).suffix.lower()
    known = Image.registered_extensions().get(suffix)
    if known is None or known not in Image.SAVE:
        raise ValueError(f"no picture format for the ending {suffix!r}; use .png, .jpg or .webp")
    return known


def write_image(image: Image.Image, path: Path | str) -> None:
    """Write a picture in the format that its name ends in; the file appears whole or not at all.

    Raises:
        ValueError: a name whose ending is no picture format.
        OSError: the file cannot be written.
    """
    encoded = io.BytesIO()
    image.save(encoded, format=picture_format(path))
    write_bytes(path, encoded.getvalue())


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file that appears whole or not at all: a neighbour is written, then renamed.

    Raises OSError when it cannot be written; no neighbour is left behind then.
    """
    target = Path(path)
    neighbour = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(neighbour, "xb") as stream:
            stream.write(data)
        os.replace(neighbour, target)
    except BaseException:
        neighbour.unlink(missing_ok=True)
        raise
