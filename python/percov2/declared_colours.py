"""What a picture's container says about its colours: one rule for all formats.

The first declaration that says something wins: cICP (PNG, QOI); an ICC profile; nclx (AVIF, HEIF);
sRGB (PNG); gAMA and cHRM (PNG), chromaticities (TIFF); the colour space of Exif. That is the order
of the specifications of PNG and MIAF. Without any, samples are sRGB. A high dynamic range is
refused wherever it is declared.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from percov2.colour_spaces import (
    ADOBE_RGB,
    SRGB,
    UNSPECIFIED,
    ColourSpace,
    from_cicp,
    from_gamma,
    is_known,
    refuse_hdr,
)

__all__ = [
    "CODE_POINTS",
    "CONVERTED",
    "UNAPPLIED",
    "declared_space",
    "has_incomplete_profile",
    "read_declarations",
]

CODE_POINTS = "percov2_cicp"
"""Key of ``Image.info``: primaries and transfer of H.273, which Pillow does not read."""
UNSUPPORTED = "percov2_unsupported"
"""Key of ``Image.info``: what a container declares that cannot be converted, as a reason."""
UNAPPLIED = "percov2_unapplied"
"""Key of ``Image.info``: the name of a declaration that is not applied."""
CONVERTED = "percov2_space"
"""Key of ``Image.info``: the space of samples whose curve was changed to that of sRGB."""
_ENUMERATED = (12, 16, 17, 18)
"""Colour spaces of JPEG 2000 that Pillow's decoder converts: CMYK, sRGB, grey, sYCC."""
_COLOURED = (2, 3)
"""Photometric interpretations of TIFF that chromaticities apply to: RGB and palettes."""
_MOST_BYTES = 1 << 20
"""Longest colour box, chunk or profile that is read."""


def read_declarations(image: Image.Image, stream: BinaryIO) -> None:
    """Add to ``image.info`` what Pillow leaves out: code points, some profiles and chromaticities.

    ``stream`` is the picture's file. A damaged structure adds nothing, because Pillow has already
    decoded the picture.
    """
    start = stream.tell()
    try:
        if image.format == "PNG":
            for name, data in _png_chunks(stream):
                if name == b"cICP" and len(data) == 4:
                    image.info[CODE_POINTS] = (data[0], data[1])
                    if data[3] == 0:
                        image.info[UNSUPPORTED] = "samples of narrow range"
        elif image.format in ("AVIF", "HEIF"):
            for data in _boxes_at(stream, (b"meta", b"iprp", b"ipco", b"colr")):
                if data[:4] == b"nclx" and len(data) >= 10:
                    image.info.setdefault(CODE_POINTS, struct.unpack(">HH", data[4:8]))
        elif image.format == "JPEG2000":
            _read_jpeg2000(image, stream)
        elif image.format == "TIFF":
            _read_exif(image)
            _read_tiff(image)
        elif image.format in ("BMP", "DIB"):
            _read_bmp(image, stream)
        elif image.format == "QOI":
            stream.seek(13)
            if stream.read(1) == b"\1":
                image.info[CODE_POINTS] = (1, 8)  # linear light
    except (OSError, struct.error):
        pass
    finally:
        stream.seek(start)


def _read_jpeg2000(image: Image.Image, stream: BinaryIO) -> None:
    """Read the first colour box; a reader ignores the others (ISO/IEC 15444-1, I.5.3.3)."""
    image.info.pop("icc_profile", None)
    data = next(_boxes_at(stream, (b"jp2h", b"colr")), b"")
    if data[:1] in (b"\2", b"\3"):  # a restricted or any ICC profile
        image.info["icc_profile"] = data[3:]
    elif data[:1] == b"\1" and len(data) >= 7:
        (space,) = struct.unpack(">I", data[3:7])
        if space not in _ENUMERATED:
            image.info[UNSUPPORTED] = f"the enumerated colour space {space} of JPEG 2000"


def _read_bmp(image: Image.Image, stream: BinaryIO) -> None:
    """Read the embedded profile of a header of version 5, and name what else it declares."""
    begin = 14 if image.format == "BMP" else 0
    stream.seek(begin)
    header = stream.read(124)
    size, space = int.from_bytes(header[:4], "little"), header[56:60][::-1]
    if size >= 124 and space == b"MBED":
        place, length = struct.unpack("<II", header[112:120])
        stream.seek(begin + place)
        if length <= _MOST_BYTES:
            image.info["icc_profile"] = stream.read(length)
    elif size >= 124 and space == b"LINK":
        image.info[UNAPPLIED] = "linked colour profile"
    elif size >= 108 and space == bytes(4) and any(header[60:108]):
        image.info[UNAPPLIED] = "calibrated RGB space"


def _read_tiff(image: Any) -> None:
    """Read chromaticities as those of PNG, and name a transfer function, of the current page."""
    tags = image.tag_v2
    image.info.pop("chromaticity", None)
    image.info.pop(UNAPPLIED, None)
    white, primaries = tags.get(318, SRGB.chromaticities[:2]), tags.get(319, ())
    if tags.get(262) in _COLOURED and (len(white), len(primaries)) == (2, 6):
        image.info["chromaticity"] = tuple(map(float, (*white, *primaries)))
    if 301 in tags and 34675 not in tags:
        image.info[UNAPPLIED] = "transfer function"


def _read_exif(image: Image.Image) -> None:
    """Have Pillow keep the Exif block of a TIFF file; it reads it late, from a closed file."""
    with suppress(Exception):  # a damaged block, which the caller reports
        _exif_tables(image)


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


def has_incomplete_profile(image: Image.Image) -> bool:
    """Return True for a JPEG or PNG picture whose ICC profile Pillow could not put together."""
    known = image.format in ("JPEG", "MPO", "PNG") and "icc_profile" in image.info
    return known and not image.info["icc_profile"]


def declared_space(image: Image.Image) -> ColourSpace | bytes | None:
    """Return the colour space or the ICC profile of a picture's samples; None for sRGB.

    Raises:
        ValueError: high dynamic range, or a declaration without a known meaning.
    """
    info = image.info
    if CONVERTED in info:
        space: ColourSpace = info[CONVERTED]
        return None if space == SRGB else space
    if UNSUPPORTED in info:
        raise ValueError(f"the picture has {info[UNSUPPORTED]}; convert it to sRGB first")
    if nclx := info.get("nclx_profile"):  # of pillow-heif
        info[CODE_POINTS] = nclx["color_primaries"], nclx["transfer_characteristics"]
    codes, profile = info.get(CODE_POINTS), info.get("icc_profile")
    if codes is not None:
        refuse_hdr(codes[1])
        weak = image.format in ("AVIF", "HEIF") and profile
        later = profile or {"srgb", "gamma", "chromaticity"} & set(info)
        silent = codes == UNSPECIFIED or (later and not is_known(*codes))
        if not (weak or silent):
            space = from_cicp(*codes)
            return None if space == SRGB else space
    if profile:
        refuse_hdr(_transfer_of(profile))
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
        table, interoperability = _exif_tables(image)
    except Exception:  # a damaged block, which the caller reports
        unread: Any = image
        unread._exif = None  # Pillow would not raise its error again
        return False
    space = table.get(ExifTags.Base.ColorSpace)
    index = interoperability.get(ExifTags.Interop.InteropIndex)
    if space == 0xFFFF:
        return not str(index).startswith("R98")
    return space == 2 or (space is None and str(index).startswith("R03"))


def _exif_tables(image: Image.Image) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the tables Exif and Interoperability of a picture, empty ones where there is none."""
    exif = image.getexif()
    table = exif.get_ifd(ExifTags.IFD.Exif)
    try:
        return table, exif.get_ifd(ExifTags.IFD.Interop)
    except KeyError:  # of Pillow before 13, if there is none
        return table, {}


def _transfer_of(profile: bytes) -> int:
    """Return the transfer of H.273 that an ICC profile names in its tag cicp; 2 for none."""
    count = int.from_bytes(profile[128:132], "big")
    for i in range(min(count, 100)):
        name, offset, _ = struct.unpack(">4sII", profile[132 + 12 * i :][:12].ljust(12, b"\0"))
        if name == b"cicp" and len(profile) > offset + 9:
            return profile[offset + 9]
    return UNSPECIFIED[1]
