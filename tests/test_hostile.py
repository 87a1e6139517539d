"""Damaged and made-up files: refused with a reason, in bounded time and memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import random_model
from percov2 import BitstreamError, Codec, bitstream
from percov2.models.preset import Rate
from percov2.packing import pack

CHECK_LUCK = 2
"""Files that may pass the 16-bit check by chance; 0.1 are expected in 5,000."""


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """No test here may take more than 1 GB on top of what the process has."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown <= 1_000_000, f"{grown} kB"


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """A codec with tokens of 64 pixels: most made-up headers declare few of them."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    return Codec.from_pretrained(random_model.build(folder, rates=(Rate("r", 64, 64),), layers=1))


@pytest.fixture(scope="module")
def valid(codec: Codec) -> bytes:
    """A file of 6x8 tokens with a caption."""
    tokens = np.random.default_rng(3).integers(0, 64, (6, 8), dtype=np.int32)
    return codec.pack([tokens], [(370, 501)], "r", "checkerboard", ["a red door"])[0]


def accepted(codec: Codec, files: Iterator[bytes]) -> tuple[int, set[str]]:
    """How many files are accepted, and the kinds of faults of the others.

    What is accepted must give a picture.
    """
    count, faults = 0, set()
    for data in files:
        try:
            header = codec.decode([data])[0].header
        except BitstreamError as error:
            faults.add(str(error)[:18])
            continue
        count += 1
        (picture,) = codec.decompress([data])
        assert picture.size == (header.width, header.height)
    return count, faults


def test_the_file_is_valid(codec: Codec, valid: bytes) -> None:
    assert accepted(codec, iter([valid])) == (1, set())


def test_every_truncation_is_refused(codec: Codec, valid: bytes) -> None:
    cuts = (valid[:length] for length in range(len(valid)))
    assert accepted(codec, cuts)[0] == 0
    longer = (valid + bytes([byte]) for byte in range(256))
    assert accepted(codec, longer)[0] == 0


def test_bit_flips_are_refused(codec: Codec, valid: bytes) -> None:
    rng = np.random.default_rng(0)

    def flipped() -> Iterator[bytes]:
        for _ in range(2000):
            damaged = bytearray(valid)
            bit = int(rng.integers(8 * len(valid)))
            damaged[bit // 8] ^= 1 << bit % 8
            yield bytes(damaged)

    count, faults = accepted(codec, flipped())
    assert count <= CHECK_LUCK
    assert len(faults) >= 4  # the header's faults have names of their own


def test_random_bytes_are_refused(codec: Codec, valid: bytes) -> None:
    rng = np.random.default_rng(1)

    def strings() -> Iterator[bytes]:
        for i in range(2000):
            # Every eighth string gets past magic, version and model id.
            yield (valid[:4] if i % 8 == 0 else b"") + rng.bytes(int(rng.integers(1, 120)))

    count, faults = accepted(codec, strings())
    assert count <= CHECK_LUCK
    assert len(faults) >= 4


def test_huge_declared_sizes_are_refused_at_once(codec: Codec, valid: bytes) -> None:
    from reference_rans import encode

    for height, width, message in [
        (65536, 65536, "more than the limit"),
        (8000, 8000, "cannot hold"),
    ]:
        header = bitstream.Header(codec.model_id("r"), height, width)
        symbols = [(start, freq, 12) for start, freq in bitstream.header_intervals(header)]
        data = bitstream.prefix(header) + encode(0xFFFF, symbols) + bytes(50)
        with pytest.raises(BitstreamError, match=message):
            codec.decode([data])


def test_caption_bombs_are_refused(codec: Codec) -> None:
    import zlib

    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = (deflater.compress(bytes(2_000_000)) + deflater.flush())[:4000] + b"\x01"
    header = bitstream.Header(codec.model_id("r"), 16, 16, caption_codec=2, caption=bomb)
    # The caption is read after the check, which therefore has to be right.
    (data,) = pack(codec._entropy("r"), [header], [np.zeros((1, 1), dtype=np.int32)])
    with pytest.raises(BitstreamError, match="caption"):
        codec.decode([data])


def test_other_files_are_named_as_such(codec: Codec, tmp_path: Path) -> None:
    for data, message in [
        (b"", "empty"),
        (b"# A text file\n", "not a .pcv2 file"),
        (b"\x89PNG\r\n\x1a\n", "not a .pcv2 file"),
        (b"\xfc", "too short"),
        (b"\xfc\x2f\0\0\0\0", "version 15"),
        (b"\xfc\x21\0\0\x12\x34", "model with id 0000"),
    ]:
        with pytest.raises(BitstreamError, match=message):
            codec.decode([data])
