"""Damaged and forged files: refused with a reason, in bounded time and memory."""

from __future__ import annotations

import multiprocessing
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracles.independent_coder import encode
from percov2 import BitstreamError, Codec
from percov2.container import bitstream
from percov2.container.tokens_file import pack
from percov2.entropy import SCHEDULES
from percov2.models.config import Rate
from tools import random_model

CHECK_LUCK = 2
"""Files that may pass the 16-bit check by chance; 0.1 are expected in 5,000."""


SECONDS = 60
"""Generous bound on the processor time of one hostile file."""
MEMORY = 1_000_000
"""Bound in kB on what hostile files add to the memory of a process that has decoded a valid one."""


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """A codec with tokens of 64 pixels: most made-up headers declare few of them."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    return Codec.from_pretrained(random_model.build(folder, rates=(Rate("r", 64, 64),), layers=1))


@pytest.fixture(scope="module")
def valid(codec: Codec) -> bytes:
    """A file of 6x8 tokens with a caption."""
    tokens = np.random.default_rng(3).integers(0, 64, (6, 8), dtype=np.int32)
    return codec.pack(
        [tokens], [(370, 501)], rate="r", schedule="checkerboard", caption=["a red door"]
    )[0]


def accepted(codec: Codec, files: Sequence[bytes]) -> tuple[int, set[str]]:
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


def test_every_truncation_is_refused(codec: Codec, valid: bytes) -> None:
    assert accepted(codec, [valid]) == (1, set())
    assert accepted(codec, [valid[:length] for length in range(len(valid))])[0] == 0
    assert accepted(codec, [valid + bytes([byte]) for byte in range(256)])[0] == 0


def test_lenient_reading_gives_a_picture_or_a_reason(codec: Codec, valid: bytes) -> None:
    rng = np.random.default_rng(2)
    files = [valid[:length] for length in range(len(valid))]
    for _ in range(300):
        damaged = bytearray(valid[: int(rng.integers(4, len(valid) + 1))])
        damaged[int(rng.integers(len(damaged)))] ^= int(rng.integers(1, 256))
        files += [bytes(damaged), valid[:4] + rng.bytes(int(rng.integers(1, 60)))]
    restored = []
    for data in files:
        try:
            (file,) = codec.decode([data], max_pixels=2**20, allow_truncated=True)
        except BitstreamError:
            continue
        assert 0 <= file.stages <= file.stage_count
        assert file.tokens.min() >= 0 and file.tokens.max() < 64
        restored.append((data, file))
    assert len(restored) > 50 and any(file.stages == 0 for _, file in restored)
    (chosen, alone) = zip(*restored[::10], strict=True)
    together = codec.decode(list(chosen), max_pixels=2**20, allow_truncated=True)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.stages == other.stages


def test_bit_flips_and_random_bytes_are_refused(codec: Codec, valid: bytes) -> None:
    rng = np.random.default_rng(0)
    flipped, random = [], []
    for i in range(1000):
        damaged = bytearray(valid)
        bit = int(rng.integers(8 * len(valid)))
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(damaged))
        # Every eighth string must fail at magic, version or model id, the others get past them.
        random.append((b"" if i % 8 == 0 else valid[:4]) + rng.bytes(int(rng.integers(1, 120))))
    for files in (flipped, random):
        count, faults = accepted(codec, files)
        assert count <= CHECK_LUCK
        assert len(faults) >= 4  # the header's faults have names of their own


def test_huge_sizes_and_other_models_are_refused_at_once(codec: Codec) -> None:
    identity = codec.model_id("r")
    for named, side, message in (
        (identity, 65536, "more than the limit"),
        (identity, 8000, "cannot hold"),
        (identity ^ 1, 512, f"model with id {identity ^ 1:04x}"),
    ):
        header = bitstream.Header(named, side, side)
        symbols = [(start, freq, 12) for start, freq in bitstream.header_intervals(header)]
        data = bitstream.prefix(header) + encode(0xFFFF, symbols) + bytes(50)
        with pytest.raises(BitstreamError, match=message):
            codec.decode([data])


def test_caption_bombs_are_refused(codec: Codec) -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = (deflater.compress(bytes(2_000_000)) + deflater.flush())[:4000] + b"\x01"
    header = bitstream.Header(codec.model_id("r"), 16, 16, caption_codec=2, caption=bomb)
    # The caption is read after the check, which therefore has to be right.
    (data,) = pack(codec._entropy("r"), [header], [np.zeros((1, 1), dtype=np.int32)])
    with pytest.raises(BitstreamError, match="caption"):
        codec.decode([data])


def junk_after(codec: Codec, size: int, seed: int, **fields: Any) -> bytes:
    """A file with a sound header and random bytes instead of its tokens."""
    header = bitstream.Header(codec.model_id("r"), **fields)
    symbols = [(start, freq, 12) for start, freq in bitstream.header_intervals(header)]
    junk = [(byte, 1, 8) for byte in np.random.default_rng(seed).bytes(size)]
    return bitstream.prefix(header) + encode(0x1234, symbols + junk)


@pytest.mark.parametrize(("side", "tokens"), [(64, 1), (256, 16)])
def test_more_bytes_than_the_tokens_can_need_are_refused_at_once(codec, side, tokens):
    data = junk_after(codec, 40 * tokens, 0, height=side, width=side)
    with pytest.raises(BitstreamError, match=f"bytes are too many for the {tokens} tokens"):
        codec.decode([data])


def memory(field: str) -> int:
    """Resident memory of this process in kB: VmRSS now, VmHWM at its peak.

    Not ``ru_maxrss``: on Linux a new process begins with the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def cost_of_hostile_files(folder: Path) -> dict[str, float]:
    """Time and memory of strings that get past the model id, with tokens of 16 pixels.

    Runs in a process of its own, so that no earlier test has raised its peak memory.
    """
    codec = Codec.from_pretrained(
        random_model.build(folder / "small", rates=(Rate("r", 16, 64),), layers=1)
    )
    (valid,) = codec.pack([np.ones((6, 8), dtype=np.int32)], [(96, 128)])
    codec.decode([valid])
    rng = np.random.default_rng(7)
    files = [valid[:4] + rng.bytes(int(rng.integers(1, 120))) for _ in range(1000)]
    for schedule in range(bitstream.SCHEDULE_INDICES):
        for size in (8, 60, 300):
            made: dict[str, Any] = {"schedule": schedule, "height": 512, "width": 512}
            files.append(junk_after(codec, size, size, **made))
            files.append(junk_after(codec, size, size, **made, dense=False))
            made = {"schedule": schedule, "height": 8000, "width": 8000}
            files.append(junk_after(codec, size, size, **made))
    raster, other = SCHEDULES.index("raster"), SCHEDULES.index("qlds12")
    for schedule, side in ((raster, 1024), (raster, 1040), (raster, 8000), (other, 4000)):
        files.append(
            junk_after(codec, 20, 0, schedule=schedule, height=side, width=side, dense=False)
        )
    # The most tokens and the most stages of a file that holds a part of them.
    parts = [
        junk_after(codec, 20, 0, schedule=schedule, height=side, width=side, stages_sent=1)
        for schedule, side in ((other, 4096), (raster, 1024))
    ]
    before = memory("VmRSS")
    slowest, passed = 0.0, 0
    for lenient, some in ((False, files + parts), (True, files[::20] + parts)):
        for data in some:
            begin = time.process_time()
            try:
                codec.decode([data], allow_truncated=lenient)
                passed += not lenient
            except BitstreamError:
                pass
            slowest = max(slowest, time.process_time() - begin)
    return {"passed": passed, "seconds": slowest, "kB": memory("VmHWM") - before}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_hostile_files_cost_bounded_time_and_memory(tmp_path: Path) -> None:
    # An executor says when its process has died; a pool would wait for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        cost = executor.submit(cost_of_hostile_files, tmp_path).result()
    print(cost)
    assert cost["passed"] <= CHECK_LUCK
    assert cost["seconds"] <= SECONDS
    assert cost["kB"] <= MEMORY
