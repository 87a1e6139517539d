"""The structure of picture files, where Pillow would take too long, or drop or mistake a part."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from PIL import Image, ImageFile, TiffImagePlugin

__all__ = [
    "StructureError",
    "TiffPage",
    "check_data",
    "check_structure",
    "dropped_parts",
    "is_followed",
    "is_pending",
    "main_page",
    "needs_libtiff",
    "signature",
    "tiff_pages",
    "use_libtiff",
]

_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}
_MOST_CHUNKS = 100_000
_MOST_SCANS = 500
_MOST_PAGES = 1000
_PNM_HEADER = 1 << 16
_BLOCK = 1 << 18
_OLD_JPEG = 6
"""The compression of TIFF whose data other tags may locate."""
_ADAM7 = [
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
]
"""First column and row, and the distances of columns and of rows, of each pass of a PNG picture."""


class StructureError(ValueError):
    """A picture whose structure costs too much time, or hides the picture from Pillow."""


def signature(stream: BinaryIO) -> str:
    """Return the name of the format that a file begins like, or ""."""
    stream.seek(0)
    head = stream.read(32)
    if head[4:8] == b"ftyp" and b"avif" in head[8:]:
        return "AVIF"
    return next((name for first, name in _SIGNATURES.items() if head.startswith(first)), "")


def check_structure(stream: BinaryIO) -> None:
    """Refuse files that would keep a decoder busy for minutes; leave the position as it was.

    Raises:
        StructureError: a PNG file with too many chunks, a JPEG file with too many scans, or a
            portable bitmap with a very long header.
    """
    start = stream.tell()
    head = stream.read(8)
    if head == b"\x89PNG\r\n\x1a\n":
        _check_png(stream)
    elif head[:3] == b"\xff\xd8\xff":
        _check_jpeg(stream)
    elif re.match(rb"P[0-6fy]", head):
        _check_pnm(head + stream.read(_PNM_HEADER))
    stream.seek(start)


def _check_png(stream: BinaryIO) -> None:
    for _ in range(_MOST_CHUNKS):
        header = stream.read(8)
        if len(header) < 8 or header[4:] == b"IEND":
            return
        stream.seek(int.from_bytes(header[:4], "big") + 4, 1)
    raise StructureError(f"the picture has more than {_MOST_CHUNKS} chunks")


def _check_jpeg(stream: BinaryIO) -> None:
    """Count scans. In compressed data, a byte 255 is followed by 0, so a marker is one."""
    scans, last = 0, b""
    while block := stream.read(1 << 20):
        scans += (last + block).count(b"\xff\xda")
        last = block[-1:]
    if scans > _MOST_SCANS:
        raise StructureError(f"the picture has {scans} scans, more than {_MOST_SCANS}")


def _check_pnm(begin: bytes) -> None:
    """Look for the end of the header, which Pillow reads a byte at a time, comments and all."""
    words = re.sub(rb"#[^\n\r]*(?:[\n\r]|\Z)", b"", begin)
    numbers = 2 if begin[:2] in (b"P1", b"P4") else 3
    found = words.split(None, 1 + numbers)
    ended = len(found) > 1 + numbers or (len(found) == 1 + numbers and words[-1:].isspace())
    if not ended and len(begin) > _PNM_HEADER:
        raise StructureError(f"the picture has a header of more than {_PNM_HEADER} bytes")


def check_data(image: Image.Image, stream: BinaryIO) -> None:
    """Refuse files with too little data for their size; Pillow leaves the rest of them black.

    The stream's position is left as it was.

    Raises:
        ValueError: a PNG file with too few rows, or a TIFF file with too few strips or tiles.
    """
    start = stream.tell()
    if image.format == "PNG":
        _check_rows(stream)
    elif image.format == "TIFF":
        _check_strips(image)
    stream.seek(start)


def _check_rows(stream: BinaryIO) -> None:
    """Count the decompressed bytes of a PNG picture; other damage is left to its decoder."""
    stream.seek(16)
    missing, inflate = _png_bytes(stream.read(13)), zlib.decompressobj()
    stream.seek(4, 1)
    try:
        for piece in _png_data(stream):
            while missing and (rows := inflate.decompress(piece, min(missing, _BLOCK))):
                missing -= len(rows)
                piece = inflate.unconsumed_tail
            if not missing:
                return
    except zlib.error:
        return
    raise ValueError("the data ends before the last row")


def _png_bytes(header: bytes) -> int:
    """Return how many bytes the rows of a PNG picture fill, each after the byte of its filter."""
    width, height, depth, kind, *_, interlaced = struct.unpack(">IIBBBBB", header)
    bits, total = depth * {2: 3, 4: 2, 6: 4}.get(kind, 1), 0
    for x, y, right, down in _ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -((x - width) // right), -((y - height) // down)
        if columns > 0:
            total += max(0, rows) * (1 - (-columns * bits // 8))
    return total


def _png_data(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the content of the first chunks IDAT in pieces."""
    started = False
    while len(header := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        if name == b"IDAT":
            started = True
            for place in range(0, length, _BLOCK):
                yield stream.read(min(_BLOCK, length - place))
            stream.seek(4, 1)
        elif started:
            return
        else:
            stream.seek(length + 4, 1)


def _check_strips(image: Any) -> None:
    tags = image.tag_v2
    if tags.get(259) == _OLD_JPEG:
        return
    width, height = tags[256], tags[257]
    offsets, counts, columns, rows = 273, 279, width, tags.get(278, height)
    if offsets not in tags:
        offsets, counts, columns, rows = 324, 325, tags.get(322), tags.get(323)
    needed = -(width // -columns) * -(height // -rows)
    if tags.get(284) == 2:
        needed *= tags.get(277, 1)
    for tag in (offsets, counts):
        if tag in tags and len(tags[tag]) < needed:
            raise ValueError(f"it has {len(tags[tag])} of {needed} strips or tiles")


def is_pending(image: Image.Image) -> bool:
    """Return True for a picture file that is opened and not decoded yet, also by a stub."""
    if not isinstance(image, ImageFile.ImageFile):
        return False
    if getattr(image, "tile", None):
        return True
    try:
        return getattr(image, "_im", image.im) is None
    except Exception:  # Pillow's own error for a picture whose decoding failed
        return True


def dropped_parts(image: Image.Image) -> list[str]:
    """Return the names of parts of a picture file that are no frames, and that are not stored."""
    info, found = image.info, []
    text = b"".join(data for _, data in getattr(image, "applist", []))
    extra = [str(name) for name in info.get("aux") or ()]
    if info.get("depth_images") or any("depth" in name for name in extra):
        found.append("depth map")
    if b'hdrgm:Version="' in text or any("gainmap" in name for name in extra):
        found.append("gain map")
    if re.search(rb'MotionPhoto="?1|MicroVideo="?1', text):
        found.append("video")
    return found


def is_followed(image: Image.Image, stream: BinaryIO) -> bool:
    """Return True if another picture follows one of JPEG or Netpbm that is not decoded yet.

    The stream's position is left as it was.
    """
    tiles: Any = getattr(image, "tile", None)
    if image.format not in ("JPEG", "PPM") or not tiles:
        return False
    start = stream.tell()
    try:
        return _jpeg_follows(stream) if image.format == "JPEG" else _pnm_follows(image, stream)
    finally:
        stream.seek(start)


def _jpeg_follows(stream: BinaryIO) -> bool:
    """Look for another start right after an end; the segments before the scan may hold previews."""
    stream.seek(2)
    while len(head := stream.read(4)) == 4 and head[1] != 0xDA:
        stream.seek(int.from_bytes(head[2:], "big") - 2, 1)
    last = b""
    while block := stream.read(_BLOCK):
        if b"\xff\xd9\xff\xd8\xff" in last + block:
            return True
        last = block[-4:]
    return False


def _pnm_follows(image: Any, stream: BinaryIO) -> bool:
    """Look for another header after the samples; a plain file has one picture."""
    decoder, _, place, args = image.tile[0]
    if decoder == "ppm_plain":
        return False
    bits = {"1": 1, "F": 32}.get(image.mode, 8)
    if args == "I;16B" or (decoder == "ppm" and args[1] > 255):
        bits = 16
    row = -(-image.width * len(image.getbands()) * bits // 8)
    stream.seek(place + image.height * row)
    return re.match(rb"P[1-7Ff]\s", stream.read(3)) is not None


class TiffPage(NamedTuple):
    """A page of a TIFF file.

    Attributes:
        is_secondary: it is a reduced version or a mask of another page.
        has_profile: it has an ICC profile.
        has_directories: it has sub-directories, which may hold the picture it is a version of.
    """

    is_secondary: bool
    has_profile: bool
    has_directories: bool


def tiff_pages(stream: BinaryIO) -> list[TiffPage]:
    """Return the first 1,000 pages of a TIFF file, in linear time; [] for a damaged one.

    Pillow needs quadratic time to count pages. The stream's position is left as it was.
    """
    try:
        start = stream.tell()
        try:
            return _pages(stream)
        finally:
            stream.seek(start)
    except (OSError, ValueError, OverflowError, struct.error):
        return []


def main_page(pages: list[TiffPage]) -> int:
    """Return the number of the first page that is no reduced version or mask; 0 if all are.

    Raises:
        StructureError: the picture is in a sub-directory, as in DNG.
    """
    number = next((i for i, page in enumerate(pages) if not page.is_secondary), None)
    if number is None and any(page.has_directories for page in pages):
        raise StructureError(
            "the picture is in a sub-directory of the TIFF file, which percov2 does not read; the "
            "file's pages are reduced versions; convert the file first"
        )
    return number or 0


def _pages(stream: BinaryIO) -> list[TiffPage]:
    stream.seek(0)
    head = stream.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    count_form, entry_form, next_form = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    (place,) = struct.unpack(order + next_form, head[8:16] if big else head[4:8])
    pages: list[TiffPage] = []
    seen: set[int] = set()
    while place and place not in seen and len(pages) < _MOST_PAGES:
        seen.add(place)
        stream.seek(place)
        (entries,) = _unpacked(stream, order + count_form)
        tags: dict[int, int] = {}
        for _ in range(min(entries, 4096)):
            tag, kind, _, value = _unpacked(stream, order + entry_form)
            tags[tag] = struct.unpack(
                order + ("H" if kind == 3 else "I"), value[: 2 if kind == 3 else 4]
            )[0]
        secondary = bool(tags.get(254, 0) & 5) or tags.get(255) == 2
        pages.append(TiffPage(secondary, 34675 in tags, 330 in tags))
        (place,) = _unpacked(stream, order + next_form)
    return pages


def _unpacked(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def needs_libtiff(image: Image.Image) -> bool:
    """Return True for a TIFF picture that Pillow's own decoder reads wrongly.

    These are uncompressed pictures with a plane per colour and more than 8 bits, and uncompressed
    YCbCr.
    """
    tiles: Any = getattr(image, "tile", None)
    if image.format != "TIFF" or not tiles or tiles[0][0] != "raw":
        return False
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(258, (8,))
    return tags.get(262) == 6 or (tags.get(284) == 2 and max(bits) > 8)


def use_libtiff(image: Image.Image) -> None:
    """Have libtiff decode a TIFF picture that is opened and not decoded yet."""
    before = TiffImagePlugin.READ_LIBTIFF
    TiffImagePlugin.READ_LIBTIFF = True
    try:
        cast(Any, image)._setup()
    finally:
        TiffImagePlugin.READ_LIBTIFF = before
