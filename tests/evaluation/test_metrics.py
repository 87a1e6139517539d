"""PSNR against its formula, networks against recorded values; baselines; reports."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from percov2.evaluation import baselines, comparisons, metric_networks, metrics, report
from percov2.evaluation.baselines import BASELINES, Attempt, attempts_within, best_of
from percov2.evaluation.metrics import METRICS, Original, measure
from percov2.models.torch.perceptual import INSTALL_HINT, MetricWeightsMissing
from percov2.options import DecodeOptions
from tools.judging import absent


def noise(side: int = 176, seed: int = 0, sigma: float = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    base = np.stack([128 + 60 * np.sin(x / 9), 128 + 60 * np.cos(y / 13), (x + y) / 2], -1)
    original = base.clip(0, 255).astype(np.uint8)
    restored = (base + rng.normal(0, sigma, base.shape)).clip(0, 255).astype(np.uint8)
    return original, restored


def test_psnr_is_the_formula():
    original = np.zeros((2, 2, 3), dtype=np.uint8)
    restored = original.copy()
    restored[0, 0, 0] = 255
    for pair in ((original, restored), (restored, original)):
        assert metrics.psnr(*pair) == pytest.approx(10 * math.log10(12))


def test_more_noise_is_worse_in_every_metric():
    weak, strong = (measure(*noise(sigma=sigma))[0] for sigma in (5, 60))
    assert weak["psnr"] is not None
    for name in METRICS:
        if weak[name] is not None:  # weights that are installed
            gain = weak[name] - strong[name]
            assert (gain if name in metrics.HIGHER_IS_BETTER else -gain) > 0, name


def test_equal_pictures_are_perfect():
    original, _ = noise()
    values, notes = measure(original, original)
    assert values["psnr"] is None
    assert any("infinite" in note for note in notes)
    for name, best in [("ms_ssim", 1.0), ("lpips_alex", 0.0), ("lpips_vgg", 0.0), ("dists", 0.0)]:
        if values[name] is not None:
            assert values[name] == pytest.approx(best, abs=1e-5)


NETWORKS = {"lpips_alex": 0.5316, "lpips_vgg": 0.4660, "dists": 0.2975}
"""Of ``noise(side=64)``, recorded from these networks with the weights of INSTALL_HINT on a CPU:
they notice a change, and are no word on other implementations."""


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_keep_their_values(name):
    original, restored = noise(side=64)
    values, notes = measure(original, restored, [name])
    if values[name] is None:
        assert "not installed" in notes[0]
        absent(notes[0])
    assert values[name] == pytest.approx(NETWORKS[name], abs=1e-3)
    assert measure(original, original, [name])[0][name] == pytest.approx(0, abs=1e-6)


def test_small_pictures_have_no_value_and_a_note():
    original, restored = noise(side=31)
    values, notes = measure(original, restored)
    assert values["psnr"] is not None
    assert [values[n] for n in METRICS[1:]] == [None] * 4
    assert len(notes) == 4
    assert any("176 pixels" in note for note in notes)
    assert measure(*noise(side=175), ["ms_ssim"])[0]["ms_ssim"] is None
    if importlib.util.find_spec("torchmetrics"):
        assert measure(*noise(side=176), ["ms_ssim"])[0]["ms_ssim"] is not None


def test_missing_weights_give_null_and_the_way_to_get_them(monkeypatch):
    def missing(name: str, device: str) -> None:
        raise MetricWeightsMissing("not installed")

    monkeypatch.setattr(metric_networks, "_load_network", missing)
    values, notes = measure(*noise(), ["lpips_alex", "dists"])
    assert values == {"lpips_alex": None, "dists": None}
    assert all(INSTALL_HINT in note for note in notes)


def test_wrong_pictures_are_refused():
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    for wrong, name, match in [
        (pixels.astype(float), "psnr", "uint8"),
        (pixels[:, :, :2], "psnr", "uint8"),
        (pixels[:3], "psnr", "cannot match"),
        (pixels, "ssim", "unknown metric 'ssim'"),
    ]:
        with pytest.raises(ValueError, match=match):
            measure(pixels, wrong, [name])


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_keep_to_their_bytes_and_prefer_more(name, monkeypatch):
    if not BASELINES[name].available():
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setattr(baselines, "SCALES", baselines.SCALES[::6])  # a search takes seconds
    image = Image.fromarray(noise(side=100, sigma=10)[0])
    scores = []
    for size in (900, 3000):
        attempts = attempts_within(name, image, size)
        assert all(a.size <= size and a.restored.size == image.size for a in attempts)
        assert len({a.scale for a in attempts}) == len(attempts)
        scores.append(best_of(Original(np.asarray(image)), attempts, ["psnr"])["psnr"][0])
    assert scores[1] >= scores[0] > 12
    assert attempts_within(name, image, 10) == []


def test_each_metric_has_its_own_best_attempt(monkeypatch):
    image = Image.new("RGB", (8, 8))
    attempts = [Attempt(Image.new("RGB", (8, 8), (i, 0, 0)), 10 + i, 1.0, i) for i in range(4)]
    values = {"psnr": [20.0, 22.0, 22.0, None], "dists": [0.3, 0.4, 0.2, 0.1]}

    def measured(original, restored, names):
        return {name: values[name][restored[0, 0, 0]] for name in names}, []

    monkeypatch.setattr(baselines, "measure", measured)
    best = best_of(Original(np.asarray(image)), attempts, ["psnr", "dists"])
    assert best == {"psnr": (22.0, attempts[1]), "dists": (0.1, attempts[3])}


def test_wins_count_pictures():
    own = [{"image": str(i), **dict.fromkeys(METRICS, 0.5)} for i in range(3)]
    rivals = [{"image": str(i), **dict.fromkeys(METRICS, 0.5 + 0.1 * (i - 1))} for i in range(2)]
    # Picture 0: the rival is lower, 1: equal, 2: the rival has no file.
    assert report.wins(own, rivals) == {m: 2 if m in ("psnr", "ms_ssim") else 1 for m in METRICS}
    rivals[1]["dists"] = None
    assert report.wins(own, rivals)["dists"] is None


def test_a_report_holds_what_it_says(codec, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, side in enumerate((48, 64)):
        Image.fromarray(noise(side=side, seed=i)[1]).save(photos / f"{i}.png")
    (photos / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    setting = report.Setting(decode=DecodeOptions(steps=1))
    result = report.evaluate(codec, photos, out, setting, ["jpeg"], progress=False)
    assert json.loads((out / "report.json").read_text()) == result
    assert [record["image"] for record in result["images"]] == ["0.png", "1.png"]
    for record, stem in zip(result["images"], "01", strict=True):
        data = (out / f"{stem}.pcv2").read_bytes()
        assert record["bytes"] == len(data)
        with Image.open(photos / record["image"]) as picture:
            assert record["bpp"] == 8 * len(data) / (picture.width * picture.height)
        restored = np.asarray(codec.decompress([data], steps=1)[0])
        with Image.open(out / f"{stem}.png") as written:
            np.testing.assert_array_equal(np.asarray(written), restored)
        assert (out / f"{stem}_compare.png").is_file()
    mean = result["mean"]
    assert mean["psnr"] == pytest.approx(np.mean([r["psnr"] for r in result["images"]]))
    assert mean["ms_ssim"] is None
    assert result["steps"] == 1
    page = (out / "report.md").read_text()
    assert f"| **mean** | {mean['bytes']:.0f} |" in page
    assert "![0: original, percov2](0_compare.png)" in page


def test_the_gallery_shows_the_best_rival(codec, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    photo = Image.fromarray(noise(side=64, seed=3)[1])
    photo.save(tmp_path / "photos" / "a.png")
    black = Image.new("RGB", photo.size)
    rivals = {"jpeg": Attempt(black, 10, 1.0, 1), "webp": Attempt(photo, 9, 1.0, 2)}
    monkeypatch.setattr(comparisons, "attempts_within", lambda name, *_: [rivals[name]])
    setting = report.Setting(decode=DecodeOptions(steps=1))
    report.evaluate(codec, tmp_path / "photos", tmp_path / "out", setting, list(rivals))
    with Image.open(tmp_path / "out" / "gallery.jpg") as page:
        assert page.width == 3 * 32 + 2 * 6
        shown = np.asarray(page.crop((76, page.height - 32, 108, page.height)), np.float64)
    expected = np.asarray(photo.resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    assert np.abs(shown - expected).mean() < 12 < np.abs(expected).mean()


def test_reports_need_pictures_with_names_of_their_own(tmp_path):
    with pytest.raises(ValueError, match="no picture in"):
        report.pictures_in(tmp_path)
    with pytest.raises(ValueError, match="'a' too"):
        report.plan_outputs([Path("x/a.png"), Path("y/a.jpg")], tmp_path)
    with pytest.raises(ValueError, match=r"a_compare\.png: it is the same file as the output"):
        report.plan_outputs([Path("x/a.png"), Path("x/a_compare.jpg")], tmp_path)
    with pytest.raises(ValueError, match=r"a\.png: it is the same file as the input"):
        report.plan_outputs([tmp_path / "a.png"], tmp_path)
    assert report.plan_outputs([tmp_path / "a.jpg"], tmp_path) == ["a"]


def test_pictures_stand_side_by_side():
    page = report.side_by_side([Image.new("RGB", (3, 2), "red"), Image.new("RGB", (4, 2), "blue")])
    assert page.size == (15, 2)
    assert page.getpixel((2, 1)) == (255, 0, 0)
    assert page.getpixel((5, 0)) == (255, 255, 255)
    assert page.getpixel((11, 0)) == (0, 0, 255)


def test_originals_are_looked_at_once(monkeypatch):
    original, first = noise(side=64, seed=5)
    second = noise(side=64, seed=6)[1]
    names = ("dists", "lpips_alex")
    expected = [measure(original, picture, names) for picture in (first, second)]
    if expected[0][1]:
        absent(expected[0][1][0])
    passes = []
    for name in names:
        network = metric_networks._network(name)
        features = network.features
        monkeypatch.setattr(network, "features", lambda x, f=features: passes.append(x) or f(x))
    known = Original(original)
    assert [measure(known, picture, names) for picture in (first, second)] == expected
    assert len(passes) == 2 * 3
