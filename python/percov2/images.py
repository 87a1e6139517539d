"""Pictures of any kind -> 8-bit sRGB arrays, and padding to whole tokens.

The conversion applies EXIF orientation, ICC profile, transparency, palette, CMYK and 16 bits.
"""

from __future__ import annotations

import importlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from percov2.colour_spaces import SRGB, ColourSpace, Curve, icc_profile, to_srgb_levels
from percov2.container.bitstream import MAX_PIXELS, MAX_SIDE
from percov2.declared_colours import (
    CONVERTED,
    UNAPPLIED,
    declared_space,
    has_incomplete_profile,
    read_declarations,
)
from percov2.picture_structure import (
    StructureError,
    check_data,
    check_structure,
    dropped_parts,
    is_followed,
    is_pending,
    main_page,
    needs_libtiff,
    signature,
    tiff_pages,
    use_libtiff,
)

__all__ = [
    "ENDINGS",
    "READ_FORMATS",
    "ImageSizeError",
    "ImageWarning",
    "check_size",
    "decode_image",
    "from_unit_range",
    "open_lazily",
    "pad",
    "read_image",
    "reflected",
    "to_rgb",
    "to_unit_range",
]

_PROFILE_SPACE = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
"""Modes that colour management reads directly, and the colour space of their profiles."""


READ_FORMATS = (
    *("PNG", "JPEG", "GIF", "BMP", "PPM"),
    *("WEBP", "AVIF", "TIFF", "JPEG2000", "HEIF", "ICO", "ICNS", "DIB", "PCX", "QOI", "SGI"),
    "TGA",  # last, because it has no signature, and an icon may look like one
)
"""Pillow's names of the formats that are read. Others are refused: some of Pillow's decoders start
an interpreter (EPS, WMF), and some are rarely tested."""


ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".dib", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".jpf", ".heic"),
    *(".heif", ".hif", ".tga", ".ico", ".icns", ".pcx", ".qoi", ".sgi"),
)
"""Endings of the names of pictures, in lower case, by which they are found in a folder."""


class ImageWarning(UserWarning):
    """A part of a picture that the conversion to sRGB ignored or replaced."""


def read_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture file of one of ``READ_FORMATS`` and decode it (an animation's first frame).

    Pictures of more than ``max_pixels`` are refused before decoding. Returns the picture as stored;
    ``to_rgb`` makes it sRGB.

    Raises:
        ValueError: no regular file, no picture, or a truncated, damaged or too large one.
        OSError: the file cannot be opened.
    """
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise ValueError("not a regular file; store the picture in a file first")
    with open(path, "rb") as stream:
        return decode_image(stream, max_pixels)


def decode_image(stream: BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the picture file of a stream. Arguments, result and ValueError as ``read_image``."""
    try:
        # Some formats decode on opening, and a container may hold more pixels than its header says.
        with _PILLOW_LIMIT.held(max_pixels):
            check_structure(stream)
            image = open_lazily(stream)
            _skip_thumbnails(image, stream)
            check_size(image.width, image.height, max_pixels)
            _decode(image, stream)
        check_size(image.width, image.height, max_pixels)
    except UnidentifiedImageError:
        if name := signature(stream):
            raise ValueError(
                f"the picture is truncated or damaged, or a kind of {name} that Pillow does not "
                "decode"
            ) from None
        stream.seek(0)
        if _is_heif(stream.read(32)) and find_spec("pillow_heif") is None:
            raise ValueError(
                "a HEIC picture needs pillow-heif: pip install 'percov2[heif]'"
            ) from None
        raise ValueError(
            f"not a picture in a format that percov2 reads: {', '.join(READ_FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageSizeError(
            f"the picture has more pixels than the limit of {max_pixels}; scale it down, or raise "
            "max_pixels"
        ) from None
    except (ImageSizeError, StructureError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of many types for damaged files
        reason = str(error) or type(error).__name__
        raise ValueError(f"the picture is truncated or damaged: {reason}") from error
    return image


def open_lazily(stream: BinaryIO) -> Image.Image:
    """Open a picture of one of ``READ_FORMATS``; the common ones need few of Pillow's modules."""
    start = stream.tell()
    Image.preinit()
    try:
        return Image.open(stream, formats=[name for name in READ_FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        stream.seek(start)
        Image.init()
        if "HEIF" not in Image.OPEN and find_spec("pillow_heif"):
            importlib.import_module("pillow_heif").register_heif_opener(thumbnails=False)
        return Image.open(stream, formats=[name for name in READ_FORMATS if name in Image.OPEN])


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and any(brand in head[8:] for brand in (b"heic", b"heix", b"mif1"))


def _skip_thumbnails(image: Image.Image, stream: BinaryIO) -> None:
    """Go to the first page of a TIFF file that is no reduced version of a picture, and no mask."""
    if image.format != "TIFF":
        return
    pages = tiff_pages(stream)
    page = main_page(pages)
    if page:
        image.seek(page)
        if not pages[page].has_profile:  # Pillow keeps that of the page before
            image.info.pop("icc_profile", None)


def _raw_mode(image: Any) -> str:
    """Return how a PNG file stores the samples of a picture that is not decoded yet, else ""."""
    tiles = getattr(image, "tile", None) if image.format == "PNG" else None
    raw = tiles[0][3] if tiles else ""
    return raw if isinstance(raw, str) else ""


def _decode(image: Image.Image, stream: BinaryIO | None) -> None:
    """Decode a picture in place, and add what Pillow leaves out if there is the file."""
    _scale_key(image)
    if needs_libtiff(image):
        use_libtiff(image)
    raw, second = _raw_mode(image), None
    if stream is not None:
        check_data(image, stream)
        read_declarations(image, stream)
        image.info[_FRAMES] = _frames_left(image)
        if raw in _SECOND_READINGS:
            second = _second_reading(stream, *_SECOND_READINGS[raw])
    image.load()
    if second is not None:
        second.load()
        _round(image, _sixteen_bits(image, second, grey=raw == "LA;16B"))


_SECOND_READINGS = {
    "RGB;16B": ("RGB", "RGB;16L"),
    "RGBA;16B": ("RGBA", "RGBA;16L"),
    "LA;16B": ("RGBA", "RGBA"),
}
"""Mode and raw mode that give what Pillow drops of a PNG file with 16 bits per sample.

Pillow keeps the upper byte of a sample. Read in the other byte order, it keeps the lower one. Grey
with alpha is read as four channels of 8 bits.
"""


def _second_reading(stream: BinaryIO, mode: str, raw: str) -> Image.Image:
    """Open a PNG picture once more, to be decoded to another mode."""
    place = stream.tell()
    stream.seek(0)
    second: Any = Image.open(io.BytesIO(stream.read()), formats=["PNG"])
    stream.seek(place)
    second._mode = mode
    second.tile = [tile._replace(args=raw) for tile in second.tile]
    return cast(Image.Image, second)


def _sixteen_bits(image: Image.Image, second: Image.Image, grey: bool) -> NDArray[np.uint16]:
    """Return the samples of a picture and its second reading, uint16 [H, W, C]."""
    if grey:
        return np.asarray(second).view(">u2").astype(np.uint16)[..., [0, 0, 0, 1]]
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(second)


def _round(image: Image.Image, samples: NDArray[np.uint16]) -> None:
    """Put samples of 16 bits into a picture of 8 bits, with the curve of sRGB if one is declared.

    A transparent colour becomes an alpha channel.
    """
    values = np.arange(65536)
    plain = ((values * 255 + 32767) // 65535).astype(np.uint8)
    levels = plain[samples]
    try:
        space = declared_space(image)
    except ValueError:  # to_rgb refuses this picture
        space = None
    if isinstance(space, ColourSpace):
        levels[..., :3] = to_srgb_levels(values / 65535, space.curve)[samples[..., :3]]
        image.info[CONVERTED] = ColourSpace(space.chromaticities, SRGB.curve)
    image.paste(Image.fromarray(levels, image.mode))
    key = image.info.get("transparency")
    if isinstance(key, tuple):
        del image.info["transparency"]
        opaque = (samples != np.array(key, np.uint16)).any(-1)
        image.putalpha(Image.fromarray(np.uint8(255) * opaque))


def _scale_key(image: Image.Image) -> None:
    """Scale PNG's transparent grey as Pillow scales the samples: from 1, 2 or 4 bits to 8.

    Only as many bits of the key count as a sample has.
    """
    key = image.info.get("transparency")
    white = {"L;2": 3, "L;4": 15}.get(_raw_mode(image))
    if white and isinstance(key, int):
        image.info["transparency"] = (key & white) * (255 // white)


class _PillowLimit:
    """Pillow's process-wide limit on pixels, with its warning made an error.

    Threads with the same limit share it; another limit waits for its turn.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users, self._pixels = 0, 0
        self._restored = ExitStack()

    @contextmanager
    def held(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._users or self._pixels == pixels)
            if not self._users:
                self._set(pixels)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if not self._users:
                    self._restored.close()
                    self._changed.notify_all()

    def _set(self, pixels: int) -> None:
        self._pixels = pixels
        self._restored.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        self._restored.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = pixels


_PILLOW_LIMIT = _PillowLimit()


class ImageSizeError(ValueError):
    """A picture with too many pixels or too long a side."""


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageSizeError for pictures that a file cannot hold or that exceed the limit."""
    if width < 1 or height < 1:
        raise ImageSizeError(f"the picture is {width}x{height}; it has no pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageSizeError(f"the picture is {width}x{height}; a side has at most {MAX_SIDE}")
    if width * height > max_pixels:
        raise ImageSizeError(
            f"the picture is {width}x{height} = {width * height} pixels, more than the limit of "
            f"{max_pixels}; scale it down, or raise max_pixels"
        )


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return a picture of any mode as sRGB, uint8 [H, W, 3].

    Orientation is applied, declared colours are converted to sRGB (relative colorimetric with black
    point compensation), transparency is flattened on white, 16-bit grey is rounded to 8 bits.
    ``percov2.declared_colours`` says which declaration wins.

    Warns:
        ImageWarning: frames, pages or transparency were dropped, or a damaged or unsuitable profile
            or orientation was ignored.

    Raises:
        ValueError: a picture that cannot be decoded, in a format that is not read, with a high
            dynamic range, or with numbers outside the range that the mode implies.
    """
    _load(image)
    if left := image.info[_FRAMES] if _FRAMES in image.info else _frames_left(image):
        _warn(left)
    for part in dropped_parts(image):
        _warn(f"the picture's {part} is not stored")
    if has_incomplete_profile(image):
        _warn("ignored a damaged or incomplete colour profile")
    if UNAPPLIED in image.info:
        _warn(f"the picture's {image.info[UNAPPLIED]} is not applied")
    space, samples = declared_space(image), _samples(image)
    unused_alpha = image.format in _WITHOUT_ALPHA
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # the picture is readable without its damaged EXIF block
        _warn(f"ignored a damaged EXIF block ({error})")
    deep = image.mode == "I" or image.mode.startswith("I;16")
    curve = space.curve if deep and isinstance(space, ColourSpace) else None
    colour, alpha = _split_alpha(_to_eight_bits(image, samples, curve))
    rgb = _to_srgb(colour, None if curve else space)
    if alpha is not None and unused_alpha and not np.asarray(alpha).any():
        _warn("the picture's alpha is zero everywhere; it was taken for unused")
    elif alpha is not None and np.asarray(alpha).min() < 255:
        _warn("transparency was flattened on white; it is not stored")
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    return np.array(rgb, dtype=np.uint8)


def _warn(message: str) -> None:
    warnings.warn(message, ImageWarning, stacklevel=3)


def _load(image: Image.Image) -> None:
    """Decode a lazily opened picture, before anything else can hide the decoder's error."""
    if is_pending(image) and image.format not in (None, "MPO", *READ_FORMATS):
        raise ValueError(
            f"a picture of format {image.format} is not read; convert it to PNG, or call its load()"
        )
    tiles: Any = getattr(image, "tile", None)
    stream = getattr(image, "fp", None) if tiles else None
    try:
        if stream is not None and (stream.closed or not stream.seekable()):
            stream = None
        _decode(image, stream)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of many types for damaged files
        if tiles:  # Pillow would take the rest of a damaged picture for decoded
            image.tile = tiles  # type: ignore[attr-defined]
        reason = str(error) or type(error).__name__
        raise ValueError(f"the picture is truncated, damaged or closed: {reason}") from error


_FRAMES = "percov2_frames"
"""Key of ``Image.info``: the result of ``_frames_left`` while the file was open."""


def _frames_left(image: Image.Image) -> str:
    """Return a warning of the frames or pages that are not stored, or ""."""
    stream = getattr(image, "fp", None)
    if image.format == "TIFF" and stream is not None:
        pages = tiff_pages(stream)
        said, here = _counted(len(pages)), image.tell()
        if here < len(pages) and pages[here].is_secondary:
            try:
                main = main_page(pages)
            except StructureError:
                return "the page is a reduced version of a picture that is not stored"
            if main != here and not pages[main].is_secondary:
                said += (
                    f", page {here + 1}, which is a reduced version or a mask; page {main + 1} is "
                    "a whole picture, which the path of the file gives"
                )
        return said
    try:
        frames = int(getattr(image, "n_frames", 1))
    except Exception:  # a damaged later frame
        frames = 2
    if frames == 1 and stream is not None and is_followed(image, stream):
        return "another picture follows in the file; it is not stored"
    return _counted(frames)


def _counted(frames: int) -> str:
    return f"the picture has {frames} frames or pages; only one is stored" if frames > 1 else ""


_WITHOUT_ALPHA = ("TGA", "BMP", "DIB", "SGI")
"""Formats whose fourth channel often holds nothing."""


class _Samples(NamedTuple):
    """The meaning of grey samples of more than 8 bits: the value of white, and black for white."""

    white: int
    inverted: bool


_SIGNED = 2


def _samples(image: Image.Image) -> _Samples:
    """Return the meaning of a picture's deep grey samples; TIFF says it in tags.

    Raises:
        ValueError: signed samples.
    """
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    bits, form = tags.get(258, (16,)), tags.get(339, (1,))
    if _SIGNED in (form if isinstance(form, tuple) else (form,)):
        raise ValueError("the picture has signed samples; convert them to unsigned ones first")
    return _Samples((1 << int(bits[0])) - 1 if bits else 65535, tags.get(262) == 0)


def _to_eight_bits(
    image: Image.Image, samples: _Samples, curve: Curve | None = None
) -> Image.Image:
    """Return modes with more than 8 bits as "L" or "LA", and other modes unchanged.

    Grey with a curve is converted to sRGB before it is rounded.
    """
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow gives 16-bit grey as I;16 or I.
        values = np.array(image).astype(np.int64)
        if samples.white > 1 << 31:
            values &= samples.white  # Pillow reads unsigned samples of 32 bits as signed ones
        low, high, white = int(values.min()), int(values.max()), samples.white
        if low < 0 or high > white:
            raise ValueError(f"grey values {low} to {high}; integer pictures must be 0 to {white}")
        shown = white - values if samples.inverted else values
        if curve is None:
            levels = ((shown * 255 + white // 2) // white).astype(np.uint8)
        else:
            levels = to_srgb_levels(shown / white, curve)
        grey = Image.fromarray(levels)
        key = image.info.get("transparency")  # the transparent 16-bit value
        if key is None:
            return grey
        return Image.merge("LA", (grey, Image.fromarray(np.uint8(255) * (values != key))))
    if image.mode == "F":
        numbers = np.array(image, dtype=np.float64)
        if not (np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() <= 1):
            raise ValueError("a floating-point picture must have finite values from 0 to 1")
        light = 1 - numbers if samples.inverted else numbers
        return Image.fromarray(np.rint(light * 255).astype(np.uint8))
    return image


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return colours in a mode of ``_PROFILE_SPACE`` or "LAB", and transparency as "L" or None."""
    if image.mode == "PA" or "transparency" in image.info or image.mode in ("RGBa", "La"):
        # Grey pictures stay grey, so that their profile fits.
        image = image.convert("LA" if image.mode in ("1", "L", "La") else "RGBA")
    if image.mode in ("RGBA", "LA"):
        *colours, alpha = image.split()
        return colours[0] if image.mode == "LA" else Image.merge("RGB", colours), alpha
    if image.mode == "1":
        return image.convert("L"), None
    known = image.mode in _PROFILE_SPACE or image.mode == "LAB"
    return image if known else image.convert("RGB"), None


def _to_srgb(image: Image.Image, declared: ColourSpace | bytes | None) -> Image.Image:
    """Return colours of mode L, RGB, CMYK or LAB, in a space or of an ICC profile, as sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return _converted(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    profile = icc_profile(declared) if isinstance(declared, ColourSpace) else declared
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            shown, flags = image, ImageCms.Flags.BLACKPOINTCOMPENSATION
            if image.mode == "L":
                # The fast way of littlecms is wrong by up to 10 levels for grey, so the exact one
                # converts a ramp of all levels.
                shown = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
                flags |= ImageCms.Flags.NOOPTIMIZE
            if space == "RGB" and shown.mode == "L":
                shown = shown.convert("RGB")  # a grey picture with a colour profile
            if space != _PROFILE_SPACE[shown.mode]:
                raise ImageCms.PyCMSError(f"a {space} profile in a {image.mode} picture")
            how = ImageCms.Intent.RELATIVE_COLORIMETRIC
            transform = ImageCms.buildTransform(source, srgb, shown.mode, "RGB", how, flags)
            converted = _converted(shown, transform)
            if image.mode == "L":
                return Image.fromarray(np.asarray(converted)[0][np.asarray(image)])
            return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            _warn(f"ignored a damaged or unsuitable colour profile ({error})")
    return image.convert("RGB")


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None  # only in-place conversion gives nothing
    return result


def reflected(length: int, padded: int) -> NDArray[np.int64]:
    """Return the source index of each of ``padded`` samples of ``length`` reflected samples.

    The last sample is not repeated (… n-2, n-1, n-2 …), and reflections alternate at both ends. A
    single sample is repeated.
    """
    if length == 1:
        return np.zeros(padded, dtype=np.int64)
    swing = np.arange(padded, dtype=np.int64) % (2 * (length - 1))
    return np.minimum(swing, 2 * (length - 1) - swing)


def pad(rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Extend uint8 [H, W, 3] by reflection at the bottom and right to multiples of ``side``."""
    rows, columns = (reflected(n, -(-n // side) * side) for n in rgb.shape[:2])
    return rgb[rows][:, columns]


def to_unit_range(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return pictures uint8 [B, H, W, 3] as float32 [B, 3, H, W] in [-1, 1]."""
    planes = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32)
    planes /= np.float32(127.5)  # in place: a large picture fills gigabytes
    planes -= np.float32(1)
    return planes


def from_unit_range(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return images float32 [B, 3, H, W] in [-1, 1] as pictures uint8 [B, H, W, 3]."""
    levels = np.rint((images + np.float32(1)) * np.float32(127.5)).clip(0, 255)
    return levels.astype(np.uint8).transpose(0, 2, 3, 1)
