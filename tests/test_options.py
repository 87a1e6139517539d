"""Options: checked once, in Python's terms, and the flags made from them."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from percov2 import BackboneOptions, Codec, DecodeOptions, EncodeOptions
from percov2.cli.options import add_options, options_of
from percov2.options import OptionError, options_from
from tools.photos import noise


@pytest.mark.parametrize(
    ("kind", "name", "good", "bad"),
    [
        (
            EncodeOptions,
            "slack",
            [0, 2, 0.5, np.float32(0.5)],
            [-0.1, 2.1, math.nan, "1", True, 10**400],
        ),
        (EncodeOptions, "effort", [0, 1000, np.int64(3)], [-1, 1001, 1.0, "1", True, None]),
        (EncodeOptions, "stages", [None, 1, 65536], [0, 65537, 1.5, False]),
        (EncodeOptions, "target_bytes", [None, 1, 1 << 26], [0, (1 << 26) + 1]),
        (EncodeOptions, "draw_seed", [0, np.int32(0)], [-1, 65536, None]),
        (EncodeOptions, "max_pixels", [1, 1 << 32], [0, (1 << 32) + 1, None]),
        (EncodeOptions, "rate", [None, "r031"], [3, b"r031"]),
        (EncodeOptions, "schedule", [None, "qlds5"], [0]),
        (DecodeOptions, "realism", [None, 0, 1, np.float64(0.5)], [-0.1, 1.1, math.nan, "1", True]),
        (DecodeOptions, "steps", [None, 1, 1000], [0, 1001, 2.0]),
        (DecodeOptions, "guidance", [None, 0, 100.0], [-1.0, 101, math.nan]),
        (DecodeOptions, "seed", [0, 2**63 - 1, np.uint8(7)], [-1, 2**63, None]),
        (DecodeOptions, "allow_truncated", [True, False], [1, "yes", None]),
        (DecodeOptions, "max_pixels", [1, 1 << 32], [0, (1 << 32) + 1, None]),
    ],
)
def test_every_option_has_its_type_and_range(kind, name, good, bad):
    for value in good:
        stored = getattr(kind(**{name: value}), name)
        assert stored == value and type(stored).__module__ == "builtins"
    number = "a whole number" if "int" in kind.__annotations__[name] else "a number"
    allowed = f"({number} from .*|a number|a text|True or False)"
    for value in bad:
        with pytest.raises(OptionError, match=rf"^{name} must be {allowed}, not "):
            kind(**{name: value})


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(OptionError, match="stages and target_bytes exclude each other"):
        EncodeOptions(stages=1, target_bytes=90)
    with pytest.raises(OptionError, match="draw_seed needs stages or target_bytes"):
        EncodeOptions(draw_seed=1)
    assert EncodeOptions(draw_seed=1, stages=3).draw_seed == 1


def test_options_are_frozen_keyword_only_and_travel():
    options = EncodeOptions(rate="r010", slack=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.rate = "r031"
    with pytest.raises(TypeError):
        EncodeOptions("r010")
    assert pickle.loads(pickle.dumps(options)) == options


def test_changes_replace_fields(codec):
    options = DecodeOptions(steps=3, seed=7)
    assert options_from(DecodeOptions, options, {"seed": 1}) == DecodeOptions(steps=3, seed=1)
    assert options_from(DecodeOptions, None, {}) == DecodeOptions()
    with pytest.raises(TypeError, match="unknown option 'step'; there are realism, steps"):
        codec.decompress([], step=3)
    with pytest.raises(TypeError, match="options must be EncodeOptions, not 'coarse'"):
        codec.compress([], "coarse")


@pytest.mark.parametrize("kind", [EncodeOptions, DecodeOptions])
def test_flags_give_the_options_back(kind):
    parser = argparse.ArgumentParser()
    add_options(parser, kind)
    assert options_of(kind, parser.parse_args([])) == kind()
    words = {"rate": "r010", "schedule": "var", "slack": "0.5", "effort": "2", "stages": "3"}
    words |= {"draw_seed": "4", "max_pixels": "99", "realism": "0.25", "steps": "5"}
    words |= {"guidance": "2.5", "seed": "6"}
    names = [one.name for one in dataclasses.fields(kind)]
    line = [x for n, w in words.items() if n in names for x in (f"--{n.replace('_', '-')}", w)]
    found = dataclasses.asdict(options_of(kind, parser.parse_args(line)))
    for name, word in words.items():
        if name in names:
            assert str(found[name]) == word
    text = parser.format_help()
    assert all(f"--{name.replace('_', '-')}" in text for name in names)
    part = argparse.ArgumentParser()
    add_options(part, kind, names[0])
    assert options_of(kind, part.parse_args([])) == kind()
    with pytest.raises(SystemExit):
        part.parse_args([f"--{names[0].replace('_', '-')}", "x"])


def pixels() -> np.ndarray:
    return np.asarray(noise(56, 40))


def test_one_picture_gives_one_file_whatever_its_kind(codec, tmp_path):
    array = pixels()
    image = Image.fromarray(array)
    path = tmp_path / "picture.png"
    image.save(path)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = codec.compress(image)
    assert isinstance(expected, bytes)
    for picture in (path, str(path), path.read_bytes(), array, tensor, tensor.float() / 255):
        assert codec.compress(picture) == expected
        assert codec.compress([picture, picture]) == [expected] * 2
    assert codec.compress(np.stack([array, array])) == [expected] * 2
    assert codec.compress(torch.stack([tensor])) == [expected]
    assert codec.compress(iter([image])) == [expected]
    grey = codec.compress(image.convert("L"))
    assert codec.compress(np.asarray(image.convert("L"))) == grey
    assert codec.compress(image, caption="a door") == codec.compress([image], caption=["a door"])[0]


def test_one_file_gives_one_picture(codec, tmp_path):
    data = codec.compress(pixels())
    path = tmp_path / "picture.pcv2"
    path.write_bytes(data)
    expected = codec.decompress(data)
    assert expected.size == (56, 40)
    for file in (path, str(path), bytearray(data), memoryview(data)):
        assert codec.decompress(file).tobytes() == expected.tobytes()
    several = codec.decompress([data, path])
    assert [image.tobytes() for image in several] == [expected.tobytes()] * 2


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (3, "a picture must be a path, the bytes of an image file.*not int"),
        (None, "not NoneType"),
        ([3], "a picture must be .*not int"),
        ({"a": 1}, "not dict"),
        (np.zeros(4, np.uint8), r"not an array \(4,\)"),
        (np.zeros((4, 4, 2), np.uint8), r"must be uint8 \[H, W\] or \[H, W, 3\], not uint8"),
        (np.zeros((4, 4, 3)), "not float64"),
        (torch.zeros(2, 4, 4), r"must be \[1, H, W\] or \[3, H, W\], not \(2, 4, 4\)"),
        (torch.full((3, 4, 4), 2.0), "must lie in 0..1"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "not torch.int64"),
        (torch.zeros(4, 4), r"not a tensor \(4, 4\)"),
        (b"no picture", "not a picture in a format that percov2 reads"),
    ],
)
def test_a_wrong_type_gets_one_clear_sentence(codec, picture, message):
    with pytest.raises(ValueError, match=message):
        codec.compress(picture)


def test_captions_go_with_pictures(codec):
    image = Image.fromarray(pixels())
    with pytest.raises(ValueError, match="caption must be a text for one picture"):
        codec.compress(image, caption=["a door"])
    for wrong in ("a door", [], ["a", "b"], [3]):
        with pytest.raises(ValueError, match=r"caption (must be a list of 1 texts|has)"):
            codec.compress([image], caption=wrong)
    with pytest.raises(ValueError, match="a file must be a path or the bytes of one, not int"):
        codec.decompress([3])


def test_wrong_arguments_of_tokens_get_one_clear_sentence(codec):
    grid = np.zeros((1, 1), np.int32)
    (data,) = codec.pack(iter([grid]), iter([(5, 7)]), rate="fine")
    for sizes in ([("4", 4)], [(4.0, 4)], [4], [(4, 4, 3)], [(0, 4)], [(True, 4)], [(4, -4)]):
        with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
            codec.pack([grid], sizes, rate="fine")
    for tokens in (None, 5, "ab"):
        with pytest.raises(ValueError, match="tokens must be a list"):
            codec.pack(tokens, [(5, 7)], rate="fine")
    decoded = codec.decode([data])
    assert codec.paint(iter(decoded))[0].size == (7, 5)
    for wrong in (None, decoded[0], b"ab", [data]):
        with pytest.raises(ValueError, match="decoded must be"):
            codec.paint(wrong)
    for limit in (float("nan"), "5", True, 0):
        with pytest.raises(ValueError, match="max_pixels must be"):
            codec.encode_tokens([np.zeros((4, 4, 3), np.uint8)], max_pixels=limit)
    with pytest.raises(ValueError, match=r"unknown rate \[\]"):
        codec.model_id([])


def test_models_and_their_options_are_checked_by_type():
    for name in (None, 3, b"tiny"):
        with pytest.raises(ValueError, match="a model must be a name or a folder"):
            Codec.from_pretrained(name)
    with pytest.raises(TypeError, match="options must be BackboneOptions"):
        Codec.from_pretrained("tiny", options={"threads": 1})
    with pytest.raises(TypeError, match="model must be a Backbone"):
        Codec(None)
    with pytest.raises(ValueError, match="unknown device 'cuda:99999999999'"):
        Codec.from_pretrained("tiny", "cuda:99999999999")
    with pytest.raises(ValueError, match="offload must be True or False, not 1"):
        BackboneOptions(offload=1)


def test_odd_buffers_are_pictures(codec, picture):
    data = picture.read_bytes()
    spread = memoryview(bytes(byte for byte in data for _ in range(2)))[::2]
    assert codec.compress(spread) == codec.compress(data)
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    assert codec.compress(np.matrix(grey)) == codec.compress(grey)


def test_a_model_folder_is_found_after_a_change_of_directory(random_model, monkeypatch, tmp_path):
    monkeypatch.chdir(random_model.parent)
    codec = Codec.from_pretrained(random_model.name)
    monkeypatch.chdir(tmp_path)
    picture = np.zeros((8, 8, 3), np.uint8)
    data = codec.compress(picture)
    assert pickle.loads(pickle.dumps(codec)).compress(picture) == data
