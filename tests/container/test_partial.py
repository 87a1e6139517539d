"""Files of a part of the stages and without their end, and the sizes that parts make possible.

What they mean is what test_independent_decoder.py says.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oracles import independent_coder
from percov2 import BitstreamError, Codec
from percov2.bench.model import torch_threads
from percov2.coarser_rates import CoarserRateWarning, encode_bounded
from percov2.container import bitstream
from percov2.container.tokens_file import (
    OpenFile,
    Tokens,
    TooFewBytes,
    encode,
    pack,
    unpack,
    unpack_cut,
    write,
    write_within,
)
from percov2.entropy import IntTransformer, TokenCoder, stages
from percov2.entropy.schedule import SCHEDULES
from percov2.entropy.transformer_config import TransformerConfig
from percov2.models.config import ModelConfig, Rate
from tools import random_model
from tools.command_line import failure, run
from tools.executors import coder_of, model_on

SIDE = 16
CONFIG = TransformerConfig(codebook_size=64, dim=16, heads=2, head_dim=8, layers=2, hidden=16)


@pytest.fixture(scope="module")
def coder() -> TokenCoder:
    return TokenCoder(IntTransformer.random(CONFIG, seed=4))


def header(h: int, w: int, name: str, sent: int = 0, seed: int = 0) -> bitstream.Header:
    return bitstream.Header(
        7, SIDE * h, SIDE * w, schedule=SCHEDULES.index(name), stages_sent=sent, seed=seed
    )


def some_tokens(seed: int, h: int, w: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 64, (h, w), dtype=np.int32)


def opened(files: Sequence[bytes]) -> list[OpenFile]:
    parsed = [bitstream.read(data) for data in files]
    sizes = [(p.header.height // SIDE, p.header.width // SIDE) for p in parsed]
    return [
        OpenFile(data, p, size, f"file {i}: ")
        for i, (data, p, size) in enumerate(zip(files, parsed, sizes, strict=True))
    ]


def test_batches_threads_and_executors_draw_the_same(coder: TokenCoder) -> None:
    maps = [some_tokens(i, 5, 8) for i in range(4)]
    heads = [header(5, 8, "quincunx", 3, seed) for seed in (0, 0, 9, 9)]
    files = pack(coder, heads, maps)
    cut = [*files[:2], *(file[:-2] for file in files), files[0][:14]]
    alone = [unpack(coder, opened([file]))[0] for file in files]
    alone_cut = [unpack_cut(coder, opened([file]))[0] for file in cut]
    for other in (coder, coder_of(model_on("torch", CONFIG, coder.model.tensors))):
        for threads in (1, 2):
            with torch_threads(threads):
                together = unpack(other, opened(files))
                together_cut = unpack_cut(other, opened(cut))
            assert all(map(np.array_equal, alone, together))
            for (tokens, held), (others, taken) in zip(alone_cut, together_cut, strict=True):
                assert np.array_equal(tokens, others) and held == taken
    assert not np.array_equal(alone[0], alone[1])


@pytest.mark.parametrize("name", ["qlds12", "raster"])
def test_a_limit_is_used_up(coder: TokenCoder, name: str) -> None:
    """Where a stage costs next to nothing, sizes do not always grow with stages."""
    tensors = {key: tensor.copy() for key, tensor in coder.model.tensors.items()}
    tensors["head.weight"].fill(0)
    tensors["head.bias"].fill(0)
    tensors["head.bias"][0] = 2**20
    sure_of_0 = TokenCoder(IntTransformer(CONFIG, tensors))
    for seed in range(4):
        rare = np.random.default_rng(seed).random((6, 6)) < 0.1
        tokens = np.where(rare, some_tokens(seed, 6, 6), 0).astype(np.int32)
        head = header(6, 6, name)
        total = int(stages(name, 6, 6).max())
        heads = [*(replace(head, stages_sent=k) for k in range(1, total)), head]
        made = pack(sure_of_0, heads, [tokens] * total)
        sizes = [len(file) for file in made]
        assert sizes != sorted(sizes)
        encoded = encode(sure_of_0, [head], [tokens])
        for limit in range(min(sizes), max(sizes) + 2):
            (file,) = write_within(encoded, limit)
            assert file == made[max(k for k in range(total) if sizes[k] <= limit)]
        with pytest.raises(ValueError, match=rf"needs {sizes[0]} bytes for its first stage"):
            write_within(encoded, min(sizes) - 1)


def test_a_picture_of_one_stage_says_what_it_needs(coder: TokenCoder) -> None:
    encoded = encode(coder, [header(1, 1, "qlds12")], [some_tokens(0, 1, 1)])
    (file,) = write(encoded)
    with pytest.raises(ValueError, match=rf"needs {len(file)} bytes for its first stage"):
        write_within(encoded, len(file) - 1)


def test_a_caption_for_a_missing_model_is_not_written(coder: TokenCoder) -> None:
    head = replace(
        header(3, 3, "qlds5"), caption_codec=bitstream.CAPTION_MODEL, caption=b"a red door"
    )
    with pytest.raises(ValueError, match="b'a red door' needs the caption model"):
        pack(coder, [head], [some_tokens(0, 3, 3)])


def test_impossible_parts_are_refused(coder: TokenCoder) -> None:
    for h, w, name, sent, message in [
        (3, 3, "qlds5", 5, "a part of 5 stages, but schedule .qlds5. has 5"),
        (257, 256, "qlds12", 1, "65536 tokens must hold all stages, and this one has 65792"),
        (65, 64, "raster", 9, "a file of more than 4096 stages must hold all"),
    ]:
        head = header(h, w, name, sent)
        with pytest.raises(ValueError, match=message):
            pack(coder, [head], [np.zeros((h, w), np.int32)])
        coded = independent_coder.encode(
            1, [(a, b, 12) for a, b in bitstream.header_intervals(head)]
        )
        files = opened([bitstream.prefix(head) + coded])
        for read in (unpack, unpack_cut):
            with pytest.raises(BitstreamError, match=f"impossible header field: .*{message}"):
                read(coder, files)


def test_files_cut_in_their_head_or_too_long_are_refused(coder: TokenCoder) -> None:
    (file,) = pack(coder, [header(6, 7, "qlds5")], [some_tokens(1, 6, 7)])
    head = replace(header(6, 7, "qlds5"), caption_codec=1, caption=b"a red door")
    (captioned,) = pack(coder, [head], [some_tokens(1, 6, 7)])
    messages = []
    for length in range(len(captioned)):
        try:
            (found,) = unpack_cut(coder, opened([captioned[:length]]))
        except BitstreamError as error:
            messages.append(str(error))
        else:
            assert found[1] >= 0
            assert bitstream.read(captioned[:length]).header == head
    assert "file 0: the file is cut: it ends inside its header or caption" in messages
    assert len(messages) < len(captioned) - 20  # most of the file is tokens
    with pytest.raises(BitstreamError, match="file 0: the file is damaged, not cut"):
        unpack_cut(coder, opened([file + b"xxxx"]))
    with pytest.raises(BitstreamError, match="damaged or cut"):
        unpack(coder, opened([file[:-1]]))


def test_the_codec_writes_and_restores_parts(codec: Codec) -> None:
    image = Image.effect_noise((200, 170), 60).convert("RGB")
    (whole,) = codec.compress([image])
    (part,) = codec.compress([image], stages=4)
    assert len(part) < len(whole)
    assert codec.compress([image], stages=99) == [whole]
    (bounded,) = codec.compress([image], target_bytes=len(whole) - 1)
    assert len(part) < len(bounded) < len(whole)
    assert codec.compress([image], target_bytes=len(whole)) == [whole]
    decoded, full = codec.decode([part, whole])
    assert (decoded.stages, full.stages, full.stage_count) == (4, 12, 12)
    (cut,) = codec.decode([whole[: len(part)]], allow_truncated=True)
    assert 1 <= cut.stages <= 4
    assert codec.decompress([whole[:40]], allow_truncated=True)[0].size == image.size
    (drawn,) = codec.compress([image], stages=4, draw_seed=65535)
    assert len(part) < len(drawn) <= len(part) + 4
    (other,) = codec.decode([drawn])
    held = stages("qlds12", *other.tokens.shape) <= 4
    np.testing.assert_array_equal(other.tokens[held], decoded.tokens[held])
    assert (other.tokens != decoded.tokens).any()
    (within,) = codec.compress([image], target_bytes=len(drawn), draw_seed=65535)
    assert within == drawn
    assert codec.compress([image], stages=99, draw_seed=7) == [whole]
    with pytest.raises(ValueError, match="draw_seed needs stages or target_bytes"):
        codec.compress([image], draw_seed=1)
    with pytest.raises(ValueError, match=r"draw_seed must be a whole number .* not 65536"):
        codec.compress([image], stages=4, draw_seed=65536)
    with pytest.raises(ValueError, match="exclude each other"):
        codec.compress([image], stages=1, target_bytes=90)
    with pytest.raises(ValueError, match=r"stages must be a whole number .* not 0"):
        codec.compress([image], stages=0)


# Rates of a model are never reordered, so a finer one may come last.
RATES = (Rate("r031", 16, 64), Rate("r010", 32, 300), Rate("r125", 8, 64))
LIMIT = 64
"""Tokens that the readers of these tests draw at most."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model.build(tmp_path_factory.mktemp("rates") / "model", rates=RATES)


@pytest.fixture
def bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Codec:
    monkeypatch.setattr(bitstream, "MAX_DRAWN_TOKENS", LIMIT)
    return Codec(Codec.from_pretrained(folder).model, None)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_coarser_rates_are_the_finest_first() -> None:
    rates = (*RATES, Rate("r0508", 16, 8192), Rate("r002", 64, 256))
    config = ModelConfig("several", rates, "r031")
    names = {rate.name: [r.name for r in config.coarser(rate)] for rate in rates}
    assert names["r125"] == ["r0508", "r031", "r010", "r002"]
    assert names["r031"] == names["r0508"] == ["r010", "r002"]
    assert names["r002"] == []


def test_a_target_takes_the_finest_rate_that_a_reader_accepts(bounded: Codec) -> None:
    image = noise(100, 100)  # 169 tokens of 8 pixels, 49 of 16
    (whole,) = bounded.compress([image], rate="r125")
    for options in (
        {"target_bytes": len(whole) - 1, "draw_seed": 7},
        {"target_bytes": 30, "draw_seed": 7},
        {"target_bytes": 30, "slack": 0.5},
        {"target_bytes": 30, "effort": 1},
    ):
        with pytest.warns(CoarserRateWarning, match=r"100x100.*r031 instead of r125"):
            (file,) = bounded.compress([image], rate="r125", **options)  # type: ignore[arg-type]
        assert bounded.compress([image], rate="r031", **options) == [file]  # type: ignore[arg-type]
        (decoded,) = bounded.decode([file])
        assert decoded.rate.name == "r031" and len(file) <= options["target_bytes"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bounded.compress([image], rate="r125", target_bytes=len(whole)) == [whole]
        (small,) = bounded.compress([noise(64, 64)], rate="r125", target_bytes=40)  # 64 tokens
    assert bounded.decode([small])[0].rate.name == "r125"


def test_a_target_goes_down_until_a_file_fits(bounded: Codec) -> None:
    image = noise(150, 140)  # 100 tokens even of 16 pixels, 25 of 32
    (whole,) = bounded.compress([image], rate="r031")
    for rate, target, taken in (
        ("r125", 25, "r010"),
        ("r031", 25, "r010"),
        ("r125", len(whole), "r031"),
    ):
        with pytest.warns(CoarserRateWarning, match=f"{taken} instead of {rate}"):
            (file,) = bounded.compress([image], rate=rate, target_bytes=target)
        assert bounded.decode([file])[0].rate.name == taken
        assert (file == whole) == (taken == "r031")
    with pytest.raises(ValueError, match=r"picture 1 of 150x140 needs \d+ bytes for its first"):
        bounded.compress([noise(8, 8), image], rate="r125", target_bytes=11)


def test_a_picture_without_a_coarser_rate_says_what_a_file_must_hold(bounded: Codec) -> None:
    image = noise(300, 300)  # 100 tokens of 32 pixels
    (whole,) = bounded.compress([image], rate="r010")
    message = rf"needs {len(whole)} bytes.*of more than 64 tokens must hold all"
    with pytest.raises(ValueError, match=message):
        bounded.compress([image], rate="r010", target_bytes=len(whole) - 1)


def test_every_picture_of_a_batch_has_a_rate_of_its_own(bounded: Codec) -> None:
    images = [noise(100, 100), noise(64, 48), noise(100, 100), noise(40, 40)]
    captions = ["a", "b", "c", "d"]
    with pytest.warns(CoarserRateWarning, match=r"picture [02] of 100x100"):
        files = bounded.compress(images, rate="r125", caption=captions, target_bytes=30)
    alone = [
        bounded.compress(
            [image], rate="r031" if image.width == 100 else "r125", caption=[text], target_bytes=30
        )[0]
        for image, text in zip(images, captions, strict=True)
    ]
    assert files == alone
    decoded = bounded.decode(files)
    assert [one.rate.name for one in decoded] == ["r031", "r125", "r031", "r125"]
    assert [one.caption for one in decoded] == captions


def test_stages_that_a_reader_refuses_are_refused_before_anything_is_computed(
    bounded: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(100, 100)
    (whole,) = bounded.compress([image], rate="r125")
    assert bounded.compress([image], rate="r125", stages=12) == [whole]
    monkeypatch.setattr(bounded.model, "encode_tokens", None)
    with pytest.raises(ValueError, match=r"of more than 64 tokens .* this one has 169.*coarser"):
        bounded.compress([noise(8, 8), image], rate="r125", stages=3)


def test_raster_in_part_is_bounded_by_its_stages(
    bounded: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitstream, "MAX_DRAWN_TOKENS", 1000)
    monkeypatch.setattr(bitstream, "MAX_SPARSE_STAGES", LIMIT)
    image = noise(100, 100)
    with pytest.warns(CoarserRateWarning, match="r031 instead of r125"):
        (file,) = bounded.compress([image], rate="r125", schedule="raster", target_bytes=30)
    assert bounded.decode([file])[0].rate.name == "r031"
    with pytest.raises(ValueError, match=r"3 stages .*'raster' has 169.*coarser"):
        bounded.compress([image], rate="r125", schedule="raster", stages=3)


def test_the_command_says_that_it_takes_a_coarser_rate(
    bounded: Codec, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, out = tmp_path / "photo.png", tmp_path / "photo.pcv2"
    noise(100, 100).save(path)
    options = ("--model", folder, "--rate", "r125")
    assert run("compress", path, out, *options, "--target-bytes", 30) == 0
    warning, summary = capsys.readouterr().err.splitlines()
    assert warning.startswith("percov2: warning: ") and "r031 instead of r125" in warning
    assert summary.endswith("(100x100, r031)")
    assert "64 tokens" in failure(capsys, "compress", path, out, *options, "--stages", 3)


def test_the_limit_is_that_of_the_format(folder: Path) -> None:
    """65,536 tokens of 8 pixels are 2048x2048; a column more is too much."""
    with pytest.raises(ValueError, match="of more than 65536 tokens"):
        Codec.from_pretrained(folder).compress(
            [Image.new("L", (2056, 2048))], rate="r125", stages=3
        )
    tried = []

    def encode(rate: Rate, chosen: Sequence[int]) -> list[bytes]:
        tried.append((rate.name, list(chosen)))
        if chosen == [1] and rate.name == "r125":
            raise TooFewBytes("too long")
        return [bytes([i]) for i in chosen]

    rates, sizes = [RATES[2], RATES[0], RATES[1]], [(2048, 2048), (2048, 2056)]
    with pytest.warns(CoarserRateWarning, match="2056x2048 has rate r031 instead of r125"):
        assert encode_bounded(encode, sizes, rates, schedule=0) == [b"\0", b"\1"]
    assert tried == [("r125", [0]), ("r125", [1]), ("r031", [1])]


def test_a_target_costs_one_pass_of_the_entropy_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = Codec(Codec.from_pretrained(folder).model, None)
    image = noise(160, 96)
    (whole,) = bounded.compress([image], rate="r031", schedule="raster")
    passes = []
    executor = type(bounded._entropy("r031").model)
    encode = executor.encode

    def counted(self: object, *arguments: object) -> object:
        passes.append(arguments)
        return encode(self, *arguments)

    monkeypatch.setattr(executor, "encode", counted)
    for target in (len(whole), len(whole) - 1, len(whole) // 2):
        passes.clear()
        (file,) = bounded.compress([image], rate="r031", schedule="raster", target_bytes=target)
        assert len(file) <= target and len(passes) == 1
