"""Golden files, which must give the same tokens for ever.

Files of a frozen random entropy model pin the format; those of the embedded model pin its rates.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from percov2 import Codec
from percov2.codec import CAPTIONS
from percov2.container import bitstream
from percov2.container.caption_model import CaptionModel
from percov2.container.captions import decode_caption
from percov2.container.tokens_file import OpenFile, Tokens, pack, unpack
from percov2.entropy import SCHEDULES, IntTransformer, TokenCoder
from tools.golden_pictures import CASES, FOLDER, RECORD, record

pytestmark = pytest.mark.core

DATA = Path(__file__).parents[1] / "data"
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


@pytest.fixture(scope="module")
def embedded() -> Codec:
    return Codec.from_pretrained("tiny")


def test_every_file_of_the_embedded_model_has_its_record() -> None:
    names = {path.stem for path in FOLDER.glob("*.pcv2")}
    assert names == set(CASES) == set(json.loads(RECORD.read_text()))
    for rate in ("r031", "r010", "r002"):
        assert any(case.rate == rate for case in CASES.values())
    assert {case.schedule for case in CASES.values()} == set(SCHEDULES)


@pytest.mark.parametrize("name", CASES)
def test_files_of_the_embedded_model_keep_their_tokens(embedded: Codec, name: str) -> None:
    case, expected = CASES[name], json.loads(RECORD.read_text())[name]
    data = (FOLDER / f"{name}.pcv2").read_bytes()
    header = bitstream.read(data).header
    assert f"{header.model_id:04x}" == expected["model_id"]
    assert (header.width, header.height) == case.size
    assert SCHEDULES[header.schedule] == case.schedule
    assert (header.stages_sent, header.seed) == (case.stages or 0, case.draw_seed)
    (tokens,) = embedded.decode_tokens([data])
    assert record(tokens, embedded.model_id(case.rate)) == expected
    (decoded,) = embedded.decode([data])
    assert (decoded.rate.name, decoded.caption) == (case.rate, case.caption)
    # The tokens, drawn ones included, give the file again.
    entropy = IntTransformer.load(embedded.model.folder / case.rate / "entropy")
    captions = CaptionModel.load(CAPTIONS) if case.caption else None
    assert pack(TokenCoder(entropy), [decoded.header], [tokens], captions) == [data]
