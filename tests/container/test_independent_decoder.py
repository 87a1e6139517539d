"""A decoder written from the normative documents alone reads the files of percov2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from oracles import independent_decoder as independent
from oracles import independent_model
from percov2.container import bitstream
from percov2.container.bitstream import BitstreamError, Header
from percov2.container.caption_model import Alphabet, CaptionModel
from percov2.container.captions import decode_caption, encode_caption
from percov2.container.model_id import model_id
from percov2.container.tokens_file import (
    OpenFile,
    Tokens,
    pack,
    token_grid,
    unpack,
    unpack_cut,
    with_captions,
)
from percov2.entropy import SCHEDULES, IntTransformer, TokenCoder, stages
from percov2.entropy.transformer_config import TransformerConfig
from tools.executors import FROZEN

DATA = Path(__file__).parents[1] / "data"
SIDE = 16
MODEL_ID = 0x7E57
GRIDS = [(5, 6), (1, 5), (3, 1), (1, 1)]
TEXTS = ["", "a lighthouse, é", "red door, " * 12]


class Pair(NamedTuple):
    """A model as percov2 and as the independent decoder hold it, and a caption model likewise."""

    coder: TokenCoder
    model: independent_model.Model
    captions: CaptionModel | None = None
    caption_model: independent.CaptionModel | None = None

    def write(self, header: Header, tokens: Tokens) -> bytes:
        (data,) = pack(self.coder, [header], [tokens], self.captions)
        return data

    def theirs(self, data: bytes, cut: bool = False) -> independent.Decoded:
        """What percov2 reads."""
        parsed = bitstream.read(data)
        _require_id(parsed.header.model_id, parsed.header.rate)
        grid = token_grid((parsed.header.height, parsed.header.width), SIDE)
        (file,) = with_captions([OpenFile(data, parsed, grid)], self.captions)
        h = file.parsed.header
        if cut:
            ((tokens, held),) = unpack_cut(self.coder, [file], self.captions)
        else:
            (tokens,) = unpack(self.coder, [file], self.captions)
            held = file.stages_held
        fields = (h.model_id, h.height, h.width, h.rate, h.schedule, h.stages_sent, h.seed)
        header = independent.Header(*fields, int(not h.dense), h.caption_codec)
        text = decode_caption(h.caption_codec, h.caption)
        return independent.Decoded(header, text, tokens.tolist(), held)

    def ours(self, data: bytes, cut: bool = False) -> independent.Decoded:
        """What the independent decoder reads."""

        def model_of(identity: int, rate: int) -> tuple[independent_model.Model, int]:
            _require_id(identity, rate)
            return self.model, SIDE

        decode = independent.decode_cut if cut else independent.decode
        return decode(data, model_of, self.caption_model)

    def agree(self, data: bytes, cut: bool = False) -> independent.Decoded | None:
        """What both read, or None if both refuse."""
        try:
            expected = self.theirs(data, cut)
        except BitstreamError:
            with pytest.raises(ValueError):  # noqa: PT011
                self.ours(data, cut)
            return None
        read = self.ours(data, cut)
        assert read == expected
        return read


def _require_id(identity: int, rate: int) -> None:
    if (identity, rate) != (MODEL_ID, 0):
        raise BitstreamError(f"no model {identity:04x} with rate {rate}")


def saved(transformer: IntTransformer, folder: Path) -> tuple[TokenCoder, independent_model.Model]:
    transformer.save(folder)
    return TokenCoder(transformer), independent_model.read_model(folder)


@pytest.fixture(scope="module")
def frozen() -> Pair:
    return Pair(TokenCoder(IntTransformer.load(FROZEN)), independent_model.read_model(FROZEN))


@pytest.fixture(scope="module")
def captioned(frozen: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    alphabet = Alphabet([b" a", b" red", b" door", b"ors", b" \xc3\xa9"])
    config = TransformerConfig(len(alphabet), dim=6, heads=2, head_dim=3, layers=2, hidden=5)
    folder = tmp_path_factory.mktemp("captions")
    captions = CaptionModel(alphabet, IntTransformer.random(config, seed=3))
    captions.save(folder)
    pieces = json.loads((folder / "pieces.json").read_text("utf-8"))
    return Pair(
        frozen.coder, frozen.model, captions, (independent_model.read_model(folder), list(pieces))
    )


def some_tokens(grid: tuple[int, int], codebook_size: int = 16, seed: int = 0) -> Tokens:
    drawn = np.random.default_rng(seed).integers(0, codebook_size, grid)
    return drawn.astype(np.int32)


def some_header(grid: tuple[int, int], schedule: int = 0, text: str = "", **fields: int) -> Header:
    """A header of the smallest image with this grid."""
    codec, caption = encode_caption(text)
    height, width = (SIDE * (n - 1) + 1 for n in grid)
    common = {"schedule": schedule, "caption_codec": codec, "caption": caption}
    return Header(MODEL_ID, height, width, **(common | fields))


@pytest.mark.parametrize("name", ["caption", "one_token"])
def test_the_golden_files_are_read(frozen: Pair, name: str) -> None:
    data = (DATA / f"{name}.pcv2").read_bytes()
    read = frozen.agree(data)
    assert read is not None
    assert read.caption == ("a lighthouse" if name == "caption" else "")


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
def test_files_of_every_schedule_are_read(frozen: Pair, schedule: int) -> None:
    for i, grid in enumerate(GRIDS):
        text, tokens = TEXTS[(schedule + i) % 3], some_tokens(grid, seed=i)
        read = frozen.agree(frozen.write(some_header(grid, schedule, text), tokens))
        assert read is not None
        assert read.tokens == tokens.tolist()
        assert read.caption == text


@pytest.mark.parametrize("codec", range(4))
def test_captions_of_every_codec_are_read(captioned: Pair, codec: int) -> None:
    text = "a red door" if codec == 3 else TEXTS[codec]
    header = some_header((2, 3), text=text)
    if codec == 3:
        header = some_header((2, 3), caption_codec=3, caption=text.encode())
    assert header.caption_codec == codec
    data = captioned.write(header, some_tokens((2, 3)))
    read = captioned.agree(data)
    assert read is not None
    assert (read.caption, read.header.caption_codec) == (text, codec)
    if codec == 3:
        assert captioned._replace(caption_model=None, captions=None).agree(data) is None


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
def test_stages_that_a_file_lacks_are_drawn(frozen: Pair, schedule: int) -> None:
    grid, name = ((4, 5), (7, 3))[schedule % 2], SCHEDULES[schedule]
    tokens, stage = some_tokens(grid), stages(name, *grid)
    total = int(stage.max())
    for sent, seed in {(1, 0), (total // 2, 7), (total - 1, 65535)}:
        header = some_header(grid, schedule, "hut", stages_sent=sent, seed=seed)
        read = frozen.agree(frozen.write(header, tokens))
        assert read is not None
        assert (read.stages, read.header.seed) == (sent, seed)
        assert np.array_equal(np.array(read.tokens)[stage <= sent], tokens[stage <= sent])


@pytest.mark.parametrize("size", [300, 1100])
def test_other_sizes_of_models_are_read(tmp_path: Path, size: int) -> None:
    config = TransformerConfig(size, dim=9, heads=3, head_dim=5, layers=3, hidden=7)
    pair = Pair(*saved(IntTransformer.random(config, seed=size), tmp_path))
    tokens = some_tokens((3, 4), size)
    for fields in ({}, {"stages_sent": 2, "seed": 9}):
        header = some_header((3, 4), SCHEDULES.index("quincunx"), **fields)
        assert pair.agree(pair.write(header, tokens)) is not None


def test_a_plain_picture_need_not_keep_the_promise(tmp_path: Path) -> None:
    config = TransformerConfig(2, dim=4, heads=1, head_dim=4, layers=1, hidden=4)
    transformer = IntTransformer.random(config, seed=1)
    transformer.save(tmp_path)
    tensors = dict(transformer.tensors)
    tensors["head.bias"] = np.array([2**22, -(2**22)], np.int32)
    tensors["head.shift"] = np.array([12, 12], np.int8)
    pair = Pair(*saved(IntTransformer(config, tensors), tmp_path))
    grid = (27, 27)
    header = some_header(grid, SCHEDULES.index("checkerboard"))
    data = pair.write(header, np.zeros(grid, dtype=np.int32))
    read = pair.agree(data)
    assert read is not None
    assert read.header.dense == 1


@pytest.mark.parametrize("fields", [{}, {"stages_sent": 4, "seed": 21}])
def test_files_without_their_ends_are_restored(captioned: Pair, fields: dict[str, int]) -> None:
    grid, held = (3, 4), set()
    for schedule, caption in (("qlds8", b"red"), ("raster", b"")):
        codec = {"caption_codec": 3 if caption else 0, "caption": caption}
        header = some_header(grid, SCHEDULES.index(schedule), **codec, **fields)
        tokens, stage, counts = some_tokens(grid), stages(schedule, *grid), []
        data = captioned.write(header, tokens)
        # A file that is cut in its size may be that of a large picture.
        for end in range(12, len(data) + 1):
            whole, read = captioned.agree(data[:end]), captioned.agree(data[:end], cut=True)
            assert (whole is None) == (end < len(data))
            counts.append(-1 if read is None else read.stages)
            if read is not None:
                known = stage <= read.stages
                assert np.array_equal(np.array(read.tokens)[known], tokens[known])
        assert read == whole and counts == sorted(counts)
        held |= set(counts)
    assert held >= {-1, 0, 1, 2, 4}


def test_damage_is_refused_and_read_alike_where_nothing_checks(captioned: Pair) -> None:
    grid = (3, 4)
    fields = {"caption_codec": 3, "caption": b"hut", "stages_sent": 2, "seed": 5}
    header = some_header(grid, SCHEDULES.index("quincunx"), **fields)
    data = captioned.write(header, some_tokens(grid))
    generator = np.random.default_rng(8)
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= int(generator.integers(1, 256))
        assert captioned.agree(bytes(damaged)) is None
        if i >= 16:  # behind the header: a damaged size would give a large picture
            captioned.agree(bytes(damaged[: len(data) - i % 3]), cut=True)
    for appended in (b"\x00", b"\x07\x00"):
        assert captioned.agree(data + appended) is None
        assert captioned.agree(data + appended, cut=True) is None


def test_fingerprints_and_model_ids(frozen: Pair) -> None:
    fingerprint = frozen.coder.model.fingerprint()
    assert independent_model.fingerprint(frozen.model) == fingerprint
    codebook = np.arange(32, dtype="<f4").tobytes()
    expected = model_id(SIDE, 16, fingerprint, codebook)
    assert independent_model.model_id(frozen.model, SIDE, codebook) == expected


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:3], lambda data: data[:4] + b"\x00" + data[4:]]
)
def test_what_is_no_file_is_refused(frozen: Pair, damage: Callable[[bytes], bytes]) -> None:
    data = (DATA / "one_token.pcv2").read_bytes()
    for cut in (False, True):
        assert frozen.agree(damage(data), cut) is None
