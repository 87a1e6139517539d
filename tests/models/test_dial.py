"""The realism dial, from the embedding to the command line."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from percov2.codec import Codec
from percov2.evaluation.figures import draw_modes
from percov2.evaluation.modes import operating_modes
from percov2.evaluation.setting import Setting, described
from percov2.models.config import ModelConfig
from percov2.models.tiny.torch.dial import RealismDial
from percov2.models.torch.storage import save_component
from percov2.options import DecodeOptions, EncodeOptions
from tools.judging import Means
from tools.photos import noise


@pytest.fixture(scope="module")
def dialled(random_model, tmp_path_factory) -> Path:
    """The random model with a dial that has a say, and noise in its decoder."""
    folder = tmp_path_factory.mktemp("dialled") / "model"
    shutil.copytree(random_model, folder)
    torch.manual_seed(1)
    dial = RealismDial(frequencies=3, width=8, pooled=8)
    torch.nn.init.normal_(dial.layers[-1].weight, std=3.0)
    save_component(dial, folder / "dial", "float32")
    config = ModelConfig.load(folder)
    fine, coarse = config.rates
    rates = (fine, dataclasses.replace(coarse, realism=0.25, decoder_noise=0.0))
    dataclasses.replace(config, rates=rates, realism=0.75, decoder_noise=0.5).save(folder)
    return folder


def pixels(codec: Codec, file: bytes, **options: object) -> np.ndarray:
    (restored,) = codec.decompress([file], **options)
    return np.asarray(restored)


def test_the_embedding_is_that_of_plain_sums():
    torch.manual_seed(0)
    dial = RealismDial(frequencies=3, width=5, pooled=4)
    assert not dial(torch.rand(6)).any()  # a new dial changes nothing
    torch.nn.init.normal_(dial.layers[-1].weight)
    first, _, last = dial.layers
    realism = 0.3
    angles = [realism * math.pi / 2 * 2**k for k in range(3)]
    inputs = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    hidden = []
    for row, bias in zip(first.weight.tolist(), first.bias.tolist(), strict=True):
        x = sum(w * v for w, v in zip(row, inputs, strict=True)) + bias
        hidden.append(x / (1 + math.exp(-x)))
    expected = [
        sum(w * h for w, h in zip(row, hidden, strict=True)) for row in last.weight.tolist()
    ]
    assert dial(torch.tensor([realism]))[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_realism_reaches_the_picture_and_has_defaults(dialled):
    codec = Codec.from_pretrained(dialled)
    (file,) = codec.compress([noise(64, 48)])
    usual = pixels(codec, file)
    assert np.array_equal(usual, pixels(codec, file, realism=0.75))
    others = [pixels(codec, file, realism=value) for value in (0, 0.25, 1)]
    assert len({picture.tobytes() for picture in (usual, *others)}) == 4
    (file,) = codec.compress([noise(64, 48)], rate="coarse")
    assert np.array_equal(pixels(codec, file), pixels(codec, file, realism=0.25))
    assert described(codec, Setting(EncodeOptions(rate="coarse")))["realism"] == 0.25
    assert described(codec, Setting(decode=DecodeOptions(realism=0.5)))["realism"] == 0.5


def test_the_decoder_s_noise_is_proportional_to_realism(dialled, tmp_path):
    """With a dial that the flow does not feel, realism 0.5 is half of the noise."""
    folder = shutil.copytree(dialled, tmp_path / "model")
    save_component(RealismDial(3, 8, 8), folder / "dial", "float32")
    quiet = shutil.copytree(folder, tmp_path / "quiet")
    config = ModelConfig.load(folder)
    dataclasses.replace(config, decoder_noise=0.25).save(quiet)
    codec, other = Codec.from_pretrained(folder), Codec.from_pretrained(quiet)
    (file,) = codec.compress([noise(64, 48)])
    assert np.array_equal(pixels(codec, file, realism=0.5), pixels(other, file, realism=1))
    assert not np.array_equal(pixels(codec, file, realism=0.5), pixels(codec, file, realism=1))
    (file,) = codec.compress([noise(64, 48)], rate="coarse")  # this rate has no noise
    assert np.array_equal(pixels(codec, file, realism=0), pixels(codec, file, realism=1))


def test_realism_out_of_range_or_without_a_dial_is_refused(dialled, random_model, sd3_folder):
    for folder in (random_model, sd3_folder):
        with pytest.raises(ValueError, match="no realism dial"):
            Codec.from_pretrained(folder).decompress([], realism=0.5)
    config = ModelConfig.load(dialled)
    rates = (dataclasses.replace(config.rates[0], realism=-1.0),)
    for wrong in ({"realism": 2.0}, {"realism": None}, {"rates": rates}):
        with pytest.raises(ValueError, match="realism"):
            dataclasses.replace(config, **wrong).check()


def test_modes_follow_the_dial(dialled, tmp_path):
    crops = np.stack([np.asarray(noise(32, 32).rotate(90 * i)) for i in range(4)])
    records = operating_modes(
        Codec.from_pretrained(dialled),
        crops,
        [""] * 4,
        tmp_path,
        "fine",
        steps=(1,),
        guidances=(1.0,),
        realisms=(0, 0.5, None, 0.75),
        features=Means(),
        progress=False,
    )
    assert [record["realism"] for record in records] == [0, 0.5, 0.75]
    assert len({record["psnr"] for record in records}) == 3
    draw_modes(records, tmp_path / "modes.png")
    assert (tmp_path / "modes.png").is_file()
