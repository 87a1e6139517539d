"""Picture files made byte by byte, with what Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

COLOUR_TYPES = {"grey": 0, "rgb": 2, "palette": 3, "grey alpha": 4, "rgba": 6}


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), name) + data + struct.pack(">I", zlib.crc32(name + data))


def png(kind: str, depth: int, samples: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG file of samples [H, W, C] of ``depth`` bits, with chunks before the pixels."""
    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, depth, COLOUR_TYPES[kind], 0, 0, 0)
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        bits = np.unpackbits(samples.astype(np.uint8).reshape(height, -1, 1), axis=2)[:, :, -depth:]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1)
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(lines.tobytes()))]
    assert channels in (1, 2, 3, 4)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b"")


def gama(exponent: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(exponent * 100000)))


def chrm(*chromaticities: float) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *(round(v * 100000) for v in chromaticities)))


def srgb() -> bytes:
    return chunk(b"sRGB", b"\0")


def cicp(primaries: int, transfer: int) -> bytes:
    return chunk(b"cICP", bytes([primaries, transfer, 0, 1]))


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"name\0\0" + zlib.compress(profile))


def tiff(samples: np.ndarray, bits: int, photometric: int, **more: Sequence[int]) -> bytes:
    """A TIFF file of one uncompressed strip of samples [H, W, C].

    ``more`` are 16-bit tags by "t" and their number.
    """
    height, width, channels = samples.shape
    if bits == 16:
        data = samples.astype("<u2").tobytes()
    else:
        spread = np.unpackbits(
            samples.astype(">u2").view(np.uint8).reshape(height, width * channels, 2), axis=2
        )
        data = np.packbits(spread[:, :, -bits:].reshape(height, -1), axis=1).tobytes()
    data += b"\0" * (len(data) % 2)
    tags: list[tuple[int, int, Sequence[int]]] = [
        (256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * channels), (259, 3, [1]),
        (262, 3, [photometric]), (273, 4, [8]), (277, 3, [channels]), (278, 4, [height]),
        (279, 4, [len(data)]), *((int(name[1:]), 3, values) for name, values in more.items()),
    ]  # fmt: skip
    table = b""
    for tag, kind, values in sorted(tags):
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            place, packed = 8 + len(data), packed
            data += packed + b"\0" * (len(packed) % 2)
            packed = struct.pack("<I", place)
        table += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data
    return head + struct.pack("<H", len(tags)) + table + bytes(4)


def with_tags(data: bytes, tags: dict[int, int | None], following: int = 0) -> bytes:
    """Return a TIFF file with other tags in its first page, and another next page.

    Tags have a value of 32 bits, or None, which removes them.
    """
    (place,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[place : place + 2])
    entries = {}
    for i in range(count):
        entry = data[place + 2 + 12 * i :][:12]
        entries[struct.unpack("<H", entry[:2])[0]] = entry
    for tag, value in tags.items():
        entries.pop(tag, None)
        if value is not None:
            entries[tag] = struct.pack("<HHII", tag, 4, 1, value)
    table = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + table + struct.pack("<I", following)


def bmp(colour: tuple[int, int, int], space: bytes, rest: bytes, profile: bytes = b"") -> bytes:
    """A BMP file of 4 x 4 pixels, with a header of version 5.

    ``space`` is its colour space, and ``rest`` its end points and gammas.
    """
    pixels = bytes(colour[::-1]) * 16
    header = struct.pack("<IiiHHIIiiII", 124, 4, 4, 1, 24, 0, len(pixels), 0, 0, 0, 0) + bytes(16)
    header += space[::-1] + rest.ljust(48, b"\0")
    header += struct.pack("<IIII", 4, 124 + len(pixels), len(profile), 0)
    total = 14 + len(header) + len(pixels) + len(profile)
    return b"BM" + struct.pack("<IHHI", total, 0, 0, 138) + header + pixels + profile


def avif(image: Image.Image, primaries: int, transfer: int) -> bytes:
    """An AVIF file whose nclx box has these code points."""
    out = io.BytesIO()
    image.save(out, "AVIF", quality=100, subsampling="4:4:4")
    data = out.getvalue()
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


def jpeg2000(image: Image.Image, profile: bytes) -> bytes:
    """A JPEG 2000 file with an ICC profile in place of its enumerated colour space."""
    out = io.BytesIO()
    image.save(out, "JPEG2000")
    data = out.getvalue()
    at = data.index(b"colr") - 4
    (old,) = struct.unpack(">I", data[at : at + 4])
    box = struct.pack(">I4s", 11 + len(profile), b"colr") + b"\2\0\0" + profile
    outer = data.index(b"jp2h") - 4
    (length,) = struct.unpack(">I", data[outer : outer + 4])
    resized = struct.pack(">I", length + len(box) - old)
    return data[:outer] + resized + data[outer + 4 : at] + box + data[at + old :]
