"""What a picture's container says about its colours: one rule for all formats.

The first declaration that is present wins: cICP (PNG) or nclx (AVIF, HEIF); an ICC profile; sRGB
(PNG); gAMA and cHRM (PNG); the colour space of Exif. That is the order of the PNG and AVIF
specifications. Without any, samples are sRGB.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from percov2.colour_spaces import ADOBE_RGB, SRGB, ColourSpace, from_cicp, from_gamma

__all__ = ["CODE_POINTS", "CONVERTED", "declared_space", "read_declarations"]

CODE_POINTS = "percov2_cicp"
"""Key of ``Image.info``: primaries and transfer of H.273, which Pillow does not read."""
CONVERTED = "percov2_space"
"""Key of ``Image.info``: the space of samples whose curve was changed to that of sRGB."""
_MOST_BYTES = 1 << 20
"""Longest colour box or chunk that is read."""


def read_declarations(image: Image.Image, stream: BinaryIO) -> None:
    """Add to ``image.info`` what Pillow leaves out: code points, and ICC profiles of JPEG 2000.

    ``stream`` is the picture's file. A damaged structure adds nothing, because Pillow has already
    decoded the picture.
    """
    start = stream.tell()
    try:
        if image.format == "PNG":
            for name, data in _png_chunks(stream):
                if name == b"cICP" and len(data) == 4:
                    image.info[CODE_POINTS] = (data[0], data[1])
        elif image.format in ("AVIF", "HEIF"):
            for data in _boxes_at(stream, (b"meta", b"iprp", b"ipco", b"colr")):
                if data[:4] == b"nclx" and len(data) >= 10:
                    image.info[CODE_POINTS] = struct.unpack(">HH", data[4:8])
        elif image.format == "JPEG2000" and "icc_profile" not in image.info:
            for data in _boxes_at(stream, (b"jp2h", b"colr")):
                if data[:1] in (b"\2", b"\3"):  # a restricted or any ICC profile
                    image.info["icc_profile"] = data[3:]
    except (OSError, struct.error):
        pass
    finally:
        stream.seek(start)


def _png_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield the short chunks before the pixels."""
    stream.seek(8)
    while True:
        length, name = struct.unpack(">I4s", stream.read(8))
        if name in (b"IDAT", b"IEND"):
            return
        if length <= _MOST_BYTES:
            yield name, stream.read(length)
        else:
            stream.seek(length, 1)
        stream.seek(4, 1)


def _boxes_at(stream: BinaryIO, path: tuple[bytes, ...]) -> Iterator[bytes]:
    """Yield the content of ISO base media boxes (ISO/IEC 14496-12, 15444-1) at a path."""
    size = stream.seek(0, 2)
    yield from _boxes_within(stream, 0, size, path)


def _boxes_within(
    stream: BinaryIO, begin: int, end: int, path: tuple[bytes, ...]
) -> Iterator[bytes]:
    while end - begin >= 8:
        stream.seek(begin)
        length, name = struct.unpack(">I4s", stream.read(8))
        content = begin + 8
        if length == 1:
            (length,) = struct.unpack(">Q", stream.read(8))
            content += 8
        stop = end if length == 0 else begin + length
        if stop <= begin or stop > end:
            return
        if name == path[0]:
            content += 4 * (name == b"meta")  # its version and flags
            if len(path) > 1:
                yield from _boxes_within(stream, content, stop, path[1:])
            elif stop - content <= _MOST_BYTES:
                stream.seek(content)
                yield stream.read(stop - content)
        begin = stop


def declared_space(image: Image.Image) -> ColourSpace | bytes | None:
    """Return the colour space or the ICC profile of a picture's samples; None for sRGB.

    Raises:
        ValueError: high dynamic range, or a declaration without a known meaning.
    """
    info = image.info
    if CONVERTED in info:
        space: ColourSpace = info[CONVERTED]
        return None if space == SRGB else space
    if nclx := info.get("nclx_profile"):  # of pillow-heif
        info[CODE_POINTS] = nclx["color_primaries"], nclx["transfer_characteristics"]
    if CODE_POINTS in info:
        space = from_cicp(*info[CODE_POINTS])
        return None if space == SRGB else space
    if profile := info.get("icc_profile"):
        return bytes(profile)
    if "srgb" in info:
        return None
    if "gamma" in info or "chromaticity" in info:
        space = from_gamma(info.get("gamma"), info.get("chromaticity"))
        return None if space == SRGB else space
    return ADOBE_RGB if _exif_says_adobe_rgb(image) else None


def _exif_says_adobe_rgb(image: Image.Image) -> bool:
    """Return True for Adobe RGB as DCF declares it.

    DCF knows sRGB (interoperability R98) and Adobe RGB (R03, "uncalibrated"); some writers say 2.
    """
    try:
        exif: Any = image.getexif()
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    except Exception:  # a damaged block, which the caller reports
        return False
    if space == 0xFFFF:
        return not str(index).startswith("R98")
    return space == 2 or (space is None and str(index).startswith("R03"))
