"""Files of the frozen entropy model that must mean the same tokens, in the same bytes, forever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from percov2 import bitstream
from percov2.caption import decode_caption
from percov2.entropy import SCHEDULES, IntTransformer, TokenCoder
from percov2.packing import Tokens, pack
from percov2.unpacking import OpenFile, unpack

DATA = Path(__file__).parent / "data"
SIDE = 16
MODEL_ID = 0x7E57


def stripes(h: int, w: int) -> Tokens:
    """Tokens of 16 codes by a rule of integers."""
    y, x = np.mgrid[:h, :w]
    return ((3 * y + x * x // 2 + y * x // 5) % 16).astype(np.int32)


# Name: height and width in pixels, schedule, caption, tokens.
GOLDEN = {
    "standard": (512, 512, "qlds12", "", stripes(32, 32)),
    "caption": (100, 70, "quincunx", "a lighthouse", stripes(7, 5)),
    "one_token": (1, 16, "raster", "", np.full((1, 1), 11, dtype=np.int32)),
}


@pytest.fixture(scope="module")
def coder() -> TokenCoder:
    return TokenCoder(IntTransformer.load(DATA / "entropy_v1"))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_keep_tokens_and_bytes(coder: TokenCoder, name: str) -> None:
    height, width, schedule, caption, tokens = GOLDEN[name]
    data = (DATA / f"{name}.pcv2").read_bytes()
    parsed = bitstream.read(data)
    header = parsed.header
    assert (header.model_id, header.height, header.width) == (MODEL_ID, height, width)
    assert SCHEDULES[header.schedule] == schedule
    assert header.dense
    assert decode_caption(header.caption_codec, header.caption) == caption
    (decoded,) = unpack(coder, [OpenFile(data, parsed, tokens.shape)])
    np.testing.assert_array_equal(decoded, tokens)
    assert pack(coder, [header], [tokens]) == [data]
