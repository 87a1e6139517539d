"""``target_bytes`` and ``stages`` for pictures that must be complete."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from percov2 import Codec
from percov2.coarser_rates import CoarserRateWarning, encode_bounded
from percov2.container import bitstream
from percov2.container.tokens_file import TooFewBytes
from percov2.models.config import ModelConfig, Rate
from tools import random_model
from tools.command_line import failure, run

# Rates of a model are never reordered, so a finer one may come last.
RATES = (Rate("r031", 16, 64), Rate("r010", 32, 300), Rate("r125", 8, 64))
LIMIT = 64
"""Tokens that the readers of these tests draw at most."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model.build(tmp_path_factory.mktemp("rates") / "model", rates=RATES)


@pytest.fixture
def codec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Codec:
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


def test_a_target_takes_the_finest_rate_that_a_reader_accepts(codec: Codec) -> None:
    image = noise(100, 100)  # 169 tokens of 8 pixels, 49 of 16
    (whole,) = codec.compress([image], rate="r125")
    for target in (len(whole) - 1, 30):
        with pytest.warns(CoarserRateWarning, match=r"100x100.*r031 instead of r125"):
            (file,) = codec.compress([image], rate="r125", target_bytes=target, draw_seed=7)
        assert codec.compress([image], rate="r031", target_bytes=target, draw_seed=7) == [file]
        (decoded,) = codec.decode([file])
        assert decoded.rate.name == "r031" and len(file) <= target
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codec.compress([image], rate="r125", target_bytes=len(whole)) == [whole]
        (small,) = codec.compress([noise(64, 64)], rate="r125", target_bytes=40)  # 64 tokens
    assert codec.decode([small])[0].rate.name == "r125"


def test_a_target_goes_down_until_a_file_fits(codec: Codec) -> None:
    image = noise(150, 140)  # 100 tokens even of 16 pixels, 25 of 32
    for rate in ("r125", "r031"):
        with pytest.warns(CoarserRateWarning, match=f"r010 instead of {rate}"):
            (file,) = codec.compress([image], rate=rate, target_bytes=25)
        assert codec.decode([file])[0].rate.name == "r010"
    (whole,) = codec.compress([image], rate="r031")
    with pytest.warns(CoarserRateWarning, match="r031 instead of r125"):
        assert codec.compress([image], rate="r125", target_bytes=len(whole)) == [whole]
    with pytest.raises(ValueError, match=r"picture 1 of 150x140 needs \d+ bytes for its first"):
        codec.compress([noise(8, 8), image], rate="r125", target_bytes=11)


def test_a_picture_without_a_coarser_rate_says_what_a_file_must_hold(codec: Codec) -> None:
    image = noise(300, 300)  # 100 tokens of 32 pixels
    (whole,) = codec.compress([image], rate="r010")
    message = rf"needs {len(whole)} bytes.*of more than 64 tokens must hold all"
    with pytest.raises(ValueError, match=message):
        codec.compress([image], rate="r010", target_bytes=len(whole) - 1)


def test_every_picture_of_a_batch_has_a_rate_of_its_own(codec: Codec) -> None:
    images = [noise(100, 100), noise(64, 48), noise(100, 100), noise(40, 40)]
    captions = ["a", "b", "c", "d"]
    with pytest.warns(CoarserRateWarning, match=r"picture [02] of 100x100"):
        files = codec.compress(images, rate="r125", caption=captions, target_bytes=30)
    alone = [
        codec.compress(
            [image], rate="r031" if image.width == 100 else "r125", caption=[text], target_bytes=30
        )[0]
        for image, text in zip(images, captions, strict=True)
    ]
    assert files == alone
    decoded = codec.decode(files)
    assert [one.rate.name for one in decoded] == ["r031", "r125", "r031", "r125"]
    assert [one.caption for one in decoded] == captions


def test_slack_and_effort_are_those_of_the_rate_that_is_taken(codec: Codec) -> None:
    image = noise(100, 100)
    for options in ({"slack": 0.5}, {"effort": 1}):
        with pytest.warns(CoarserRateWarning):
            (file,) = codec.compress([image], rate="r125", target_bytes=30, **options)  # type: ignore[arg-type]
        assert codec.compress([image], rate="r031", target_bytes=30, **options) == [file]  # type: ignore[arg-type]


def test_stages_that_a_reader_refuses_are_refused_before_anything_is_computed(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(100, 100)
    (whole,) = codec.compress([image], rate="r125")
    assert codec.compress([image], rate="r125", stages=12) == [whole]
    monkeypatch.setattr(codec.model, "encode_tokens", None)
    with pytest.raises(ValueError, match=r"of more than 64 tokens .* this one has 169.*coarser"):
        codec.compress([noise(8, 8), image], rate="r125", stages=3)


def test_raster_in_part_is_bounded_by_its_stages(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitstream, "MAX_DRAWN_TOKENS", 1000)
    monkeypatch.setattr(bitstream, "MAX_SPARSE_STAGES", LIMIT)
    image = noise(100, 100)
    with pytest.warns(CoarserRateWarning, match="r031 instead of r125"):
        (file,) = codec.compress([image], rate="r125", schedule="raster", target_bytes=30)
    assert codec.decode([file])[0].rate.name == "r031"
    with pytest.raises(ValueError, match=r"3 stages .*'raster' has 169.*coarser"):
        codec.compress([image], rate="r125", schedule="raster", stages=3)


def test_the_command_says_that_it_takes_a_coarser_rate(
    codec: Codec, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, out = tmp_path / "photo.png", tmp_path / "photo.pcv2"
    noise(100, 100).save(path)
    options = ("--model", folder, "--rate", "r125")
    assert run("compress", path, out, *options, "--target-bytes", 30) == 0
    said = capsys.readouterr()
    assert said.out.endswith("(100x100, r031)\n")
    assert said.err.startswith("percov2: warning: ") and said.err.count("\n") == 1
    assert "r031 instead of r125" in said.err
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
    codec = Codec(Codec.from_pretrained(folder).model, None)
    image = noise(160, 96)
    (whole,) = codec.compress([image], rate="r031", schedule="raster")
    passes = []
    executor = type(codec._entropy("r031").model)
    encode = executor.encode

    def counted(self: object, *arguments: object) -> object:
        passes.append(arguments)
        return encode(self, *arguments)

    monkeypatch.setattr(executor, "encode", counted)
    for target in (len(whole), len(whole) - 1, len(whole) // 2):
        passes.clear()
        (file,) = codec.compress([image], rate="r031", schedule="raster", target_bytes=target)
        assert len(file) <= target and len(passes) == 1
