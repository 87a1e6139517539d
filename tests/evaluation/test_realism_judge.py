"""Crops, distances between sets and their intervals against slow oracles; judged runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from percov2 import Codec
from percov2.evaluation import judge, metric_networks, metrics
from percov2.evaluation.judge import Crops, judge_realism
from percov2.evaluation.metrics import METRICS, measure, measure_batch
from percov2.evaluation.photo_bootstrap import Estimate, PhotoBootstrap
from percov2.evaluation.realism import FrechetDistance, KernelSums, frechet_distance
from percov2.evaluation.setting import Setting
from percov2.models.torch.perceptual import MetricWeightsMissing
from percov2.options import DecodeOptions, EncodeOptions
from percov2.photos import PhotoCrops, is_held_out
from tools.command_line import failure, output
from tools.judging import Means
from tools.photos import store_photos


def sets(photos: int = 6, features: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of originals and of restored crops, and the number of each crop's photo."""
    random = np.random.default_rng(photos)
    photo = np.repeat(np.arange(photos), random.integers(1, 6, photos))
    originals = random.normal(size=(len(photo), features)) + random.normal(size=(photos, 1))[photo]
    return originals, 0.8 * originals + random.normal(0.3, 0.5, originals.shape), photo


# Crops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (8, 9), (21, 33), (40, 16)])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_crops_cover_every_pixel_at_the_stride(size, stride):
    corners = Crops(8, stride).corners(*size)
    seen = np.zeros(size, int)
    for top, left in corners:
        seen[top : top + 8, left : left + 8] += 1
        assert min(top, left) >= 0 and top + 8 <= size[0] and left + 8 <= size[1]
    assert seen.min() >= 1
    assert len(set(corners)) == len(corners)
    for axis, length in enumerate(size):
        starts = sorted({corner[axis] for corner in corners})
        assert starts[:-1] == list(range(0, length - 8, stride))
        assert starts[-1] == length - 8
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    top, left = corners[-1]
    np.testing.assert_array_equal(Crops(8, stride).cut(pixels)[-1], pixels[top:, left:])


def test_crops_with_distances_are_fixed_and_nested_and_in_range():
    chosen = [Crops(8, 4, n).with_distances("a photo", 9) for n in range(1, 12)]
    assert [len(part) for part in chosen] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]
    assert all(set(few) <= set(more) for few, more in pairwise(chosen))
    assert Crops(8, 4).with_distances("a photo", 9) == chosen[-1] == list(range(9))
    firsts = {Crops(8, 4, 1).with_distances(f"photo {i}", 9)[0] for i in range(60)}
    assert firsts == set(range(9))
    for numbers, match in (
        ({"side": 8, "stride": 9}, "stride must be 1 to the side of 8, not 9"),
        ({"stride": 0}, "stride"),
        ({"distances": 0}, "distances must be at least 1"),
        ({"limit": 1}, "limit must be at least 2"),
    ):
        with pytest.raises(ValueError, match=match):
            Crops(**numbers)


# Distances between sets ---------------------------------------------------------------------------


def frechet_by_formula(a: np.ndarray, b: np.ndarray) -> float:
    one, two = np.cov(a.T), np.cov(b.T)
    roots = np.linalg.eigvals(one @ two).real.clip(0) ** 0.5
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one + two) - 2 * roots.sum()


def test_equal_sets_have_no_distance():
    a, _, photo = sets()
    few = np.random.default_rng(0).normal(size=(9, 40))  # a covariance without full rank
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert KernelSums(a, a, photo).distance() == pytest.approx(0, abs=1e-12)


def test_frechet_distance_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    theirs, ours = fid.FrechetInceptionDistance(feature=Means()), FrechetDistance(Means())
    alone = FrechetDistance(Means())
    random = torch.Generator().manual_seed(0)
    for real in (True, False):
        for count in (30, 17):
            images = torch.randint(0, 256 if real else 200, (count, 3, 4, 4), generator=random)
            ours.add(images.byte(), real)
            theirs.update(images.byte(), real)
        alone.add(images[:1].byte(), real)
    assert ours.value() == pytest.approx(float(theirs.compute()), rel=1e-4)
    with pytest.raises(ValueError, match="more pictures"):
        alone.value()


def kernel_by_loops(a: np.ndarray, b: np.ndarray, photo: np.ndarray, counts: np.ndarray) -> float:
    """KID's kernel over all pairs of different photos, photo after photo in a resample."""
    pairs = [
        (i, j)
        for i in range(len(a))
        for j in range(len(a))
        if photo[i] != photo[j]
        for _ in range(counts[photo[i]] * counts[photo[j]])
    ]

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([(x[i] @ y[j] / x.shape[1] + 1) ** 3 for i, j in pairs]))

    return mean(a, a) + mean(b, b) - mean(a, b) - mean(b, a)


# Intervals ----------------------------------------------------------------------------------------


def test_resamples_draw_photos_with_all_their_crops():
    a, b, photo = sets()
    bootstrap = PhotoBootstrap(photo, resamples=40, frechet_resamples=5)
    values = a[:, 0].copy()
    values[photo == 2] = np.nan
    mean, frechet, kernel = bootstrap.mean(values), bootstrap.frechet(a, b), bootstrap.kernel(a, b)
    assert mean is not None and mean.value == pytest.approx(np.nanmean(values))
    assert frechet.value == frechet_distance(a, b) and len(frechet.resampled) == 5
    for i, counts in enumerate(bootstrap.counts):
        assert counts.sum() == 6
        crops = np.concatenate([np.flatnonzero(photo == p) for p in np.arange(6).repeat(counts)])
        if not np.isnan(values[crops]).all():
            assert mean.resampled[i] == pytest.approx(np.nanmean(values[crops]))
        assert kernel.resampled[i] == pytest.approx(kernel_by_loops(a, b, photo, counts))
        if i < 5:
            expected = frechet_by_formula(a[crops], b[crops])
            assert frechet.resampled[i] == pytest.approx(expected, rel=1e-5)
    per_photo = np.arange(6.0)
    found = bootstrap.photo_mean(per_photo)
    np.testing.assert_allclose(found.resampled, bootstrap.counts @ per_photo / 6)
    assert bootstrap.mean(np.full(len(photo), np.nan)) is None
    once = kernel_by_loops(a, b, photo, np.ones(6, int))
    assert kernel.value == KernelSums(a, b, photo).distance() == pytest.approx(once, rel=1e-9)
    assert np.isnan(KernelSums(a, b, photo).distance(np.array([0, 6, 0, 0, 0, 0])))
    with pytest.raises(ValueError, match="two photos"):
        KernelSums(a[:2], b[:2], np.zeros(2, int))
    with pytest.raises(ValueError, match="at least two photos, not 1"):
        PhotoBootstrap(np.zeros(3, int))


def test_an_interval_holds_percentiles_around_its_estimate():
    values = np.random.default_rng(0).normal(7, 1, 5000)
    found = Estimate(5.0, values)
    assert found.bias == pytest.approx(2, abs=0.1)
    assert found.interval == pytest.approx((5 - 1.96, 5 + 1.96), abs=0.1)
    twice = found - Estimate(4.0, values - 1)
    assert twice.interval == pytest.approx((1, 1)) and twice.value == 1


def test_intervals_over_photos_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(3)
    photo, inside = np.repeat(np.arange(50), 4), 0
    for seed in range(100):
        values = random.normal(0, 1, 50)[photo] + random.normal(0, 0.1, 200)
        found = PhotoBootstrap(photo, 300, seed=seed).mean(values)
        assert found is not None
        inside += found.interval[0] <= 0 <= found.interval[1]
    assert 87 <= inside <= 99


# Measures of several pictures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "block", "names"), [(6, 4, METRICS), (2, 15, ("psnr", "ms_ssim"))]
)
def test_a_batch_is_measured_like_its_pictures(count, block, names):
    random = np.random.default_rng(0)
    originals = random.integers(0, 256, (count, 12, 12, 3), np.uint8)
    originals = originals.repeat(block, 1).repeat(block, 2)
    restored = (originals * 0.9 + random.integers(0, 20, originals.shape)).astype(np.uint8)
    restored[1] = originals[1]
    values, notes = measure_batch(originals, restored, names)
    for i in range(count):
        expected, _ = measure(originals[i], restored[i], names)
        for name in names:
            wanted = np.nan if expected[name] is None else expected[name]
            assert values[name][i] == pytest.approx(wanted, abs=1e-5, nan_ok=True), name
    assert np.isnan(values["psnr"][1]) and any("infinite" in note for note in notes)
    with pytest.raises(ValueError, match="cannot match"):
        measure_batch(originals, restored[:1])


# Judged runs --------------------------------------------------------------------------------------

SIZES = [(48, 64), (40, 32), (32, 96), (24, 96)]
CROPS = Crops(32, 16)
"""6 + 2 + 5 crops; the last photo is too small."""


@pytest.fixture
def photos(tmp_path) -> Path:
    """A cache with four held-out photos and one of training."""
    folder = store_photos(tmp_path / "cache", [*SIZES, (48, 48)], 8)
    entries = json.loads((folder / "photos.json").read_text())
    keys = [key for key in (f"photo-{i}" for i in range(200)) if is_held_out(key)]
    for entry, key in zip(entries, [*keys[: len(SIZES)], "photo-0"], strict=True):
        entry[0] = key
    (folder / "photos.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def fast(monkeypatch) -> list[int]:
    """Networks that take no time: LPIPS and DISTS become differences; how many each call saw."""
    seen: list[int] = []

    class Difference(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            seen.append(len(a))
            return (a - b).abs().mean((1, 2, 3))

    monkeypatch.setattr(metric_networks, "_load_network", lambda name, device: Difference())
    monkeypatch.setattr(judge, "lite_features", Means)
    return seen


def judged(codec: Codec, photos: Path, out: Path, crops: Crops = CROPS, **options) -> dict:
    chosen = PhotoCrops(photos, "held out")
    return judge_realism(codec, chosen, out, crops=crops, progress=False, **options)


def test_a_run_is_measured_by_its_definitions(codec, photos, tmp_path, fast):
    setting = Setting(EncodeOptions(rate="coarse"), DecodeOptions(steps=1, seed=3))
    result = judged(codec, photos, tmp_path / "out", setting=setting)
    held = PhotoCrops(photos, "held out")
    originals, restored, bits = [], [], []
    for photo in sorted(held.photos, key=lambda p: hashlib.sha256(p.key.encode()).digest()):
        if photo.height < 32:
            continue
        pixels = held.pixels(photo)
        (file,) = codec.compress([judge.Image.fromarray(pixels)], rate="coarse")
        (picture,) = codec.decompress([file], steps=1, seed=3)
        bits.append(8 * len(file) / (photo.height * photo.width))
        originals.append(CROPS.cut(np.array(pixels)))
        restored.append(CROPS.cut(np.asarray(picture)))
    number = np.repeat(np.arange(3), [len(part) for part in originals])
    a, b = np.concatenate(originals), np.concatenate(restored)
    found = {name: part and part["value"] for name, part in result["measures"].items()}
    assert result["photos"] == 3 and result["crops"] == result["crops_with_distances"] == 13
    assert found["bpp"] == pytest.approx(np.mean(bits))
    assert found["psnr"] == pytest.approx(np.mean([metrics.psnr(*x) for x in zip(a, b)]))  # noqa: B905
    assert found["ms_ssim"] is None and any("176 pixels" in note for note in result["notes"])
    difference = np.abs(a / 255 - b / 255).mean()
    assert found["dists"] == pytest.approx(difference, rel=1e-5)
    assert found["lpips_vgg"] == pytest.approx(2 * difference, rel=1e-5)
    means = [x.mean((1, 2), dtype=np.float64) / 64 for x in (a, b)]
    assert found["frechet"] == pytest.approx(frechet_by_formula(*means), rel=1e-4)
    expected = kernel_by_loops(*means, number, np.ones(3, int))
    assert found["kernel"] == pytest.approx(expected, rel=1e-4)
    for name, part in result["measures"].items():
        if part:
            assert part["interval"][0] <= part["value"] <= part["interval"][1], name
    assert json.loads((tmp_path / "out" / "realism.json").read_text()) == result
    table = (tmp_path / "out" / "realism.md").read_text().splitlines()
    assert table[0].count("|") == table[2].count("|") == 14
    setting = "realism 1, 1 steps, guidance 1.5, seed 3"
    assert table[2].startswith(f"| random | coarse | {setting} | 3 | 13 |")


def test_a_run_that_was_interrupted_goes_on(codec, photos, tmp_path, fast, monkeypatch):
    whole = judged(codec, photos, tmp_path / "whole")
    restore, calls = judge.restore, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return restore(*arguments)

    monkeypatch.setattr(judge, "restore", failing)
    with pytest.raises(KeyboardInterrupt):
        judged(codec, photos, tmp_path / "out")
    assert judged(codec, photos, tmp_path / "out") == whole
    assert len(calls) == 4  # one, the interrupted one twice, and the last
    assert judged(codec, photos, tmp_path / "out") == whole
    assert len(calls) == 4
    for name in ("realism.json", "realism.md"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "out"))
        assert one == two


def test_a_limit_takes_the_first_photos_and_may_grow(codec, photos, tmp_path, fast):
    few = judged(codec, photos, tmp_path / "out", Crops(32, 16, limit=2))
    assert few["photos"] == 2 and few["photos_large_enough"] == 3 and few["photos_given"] == 4
    stored = {path.name for path in (tmp_path / "out" / "photos").iterdir()}
    assert len(stored) == 2
    whole = judged(codec, photos, tmp_path / "out")
    assert whole["photos"] == 3 and whole["crops"] > few["crops"]
    assert stored < {path.name for path in (tmp_path / "out" / "photos").iterdir()}


def test_another_run_is_refused_in_a_folder(codec, photos, tmp_path, fast, random_model):
    out = tmp_path / "out"
    judged(codec, photos, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for options, match in [
        ({"setting": Setting(EncodeOptions(rate="coarse"))}, "rate is 'fine', not 'coarse'"),
        ({"setting": Setting(decode=DecodeOptions(steps=3))}, "steps is 2, not 3"),
        ({"setting": Setting(decode=DecodeOptions(guidance=1.0))}, "guidance is 1.5, not 1.0"),
        ({"setting": Setting(decode=DecodeOptions(seed=1))}, "seed is 0, not 1"),
        ({"crops": Crops(32, 8)}, "stride is 16, not 8"),
        ({"crops": Crops(24, 16)}, "side is 32, not 24"),
        ({"crops": Crops(32, 16, distances=1)}, "distances is None, not 1"),
        ({"features": torch.nn.Sequential(Means())}, "judge is 'Means', not 'Sequential'"),
    ]:
        with pytest.raises(ValueError, match=f"holds another run: .*{match}"):
            judged(codec, photos, out, **options)
    other = tmp_path / "model"
    shutil.copytree(random_model, other)
    config = other / "autoencoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match="weights is"):
        judged(Codec.from_pretrained(other), photos, out)
    # Weights of other rates are no part of the run.
    shutil.copytree(random_model, other, dirs_exist_ok=True)
    (other / "coarse" / "more.json").write_text("{}")
    judged(Codec.from_pretrained(other), photos, out)
    with (photos / "photos.bin").open("r+b") as stream:
        stream.write(b"\x00\x01\x02")
    with pytest.raises(ValueError, match="photos_digest is"):
        judged(codec, photos, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_distances_are_measured_on_some_crops(codec, photos, tmp_path, fast):
    whole = judged(codec, photos, tmp_path / "whole")
    fast.clear()
    some = judged(codec, photos, tmp_path / "some", Crops(32, 16, distances=2))
    assert fast == [2] * 9  # three photos, three networks
    assert some["crops"] == 13 and some["crops_with_distances"] == 6
    assert "LPIPS and DISTS cover 6 of 13 crops" in (tmp_path / "some" / "realism.md").read_text()
    for name in ("psnr", "frechet", "kernel"):
        assert some["measures"][name] == whole["measures"][name]
    assert some["measures"]["dists"]["value"] != whole["measures"]["dists"]["value"]


def test_runs_are_compared_in_pairs(codec, photos, tmp_path, fast):
    first, second, cache = tmp_path / "first", tmp_path / "second", tmp_path / "originals"
    other = judged(codec, photos, first, cache=cache)
    assert not (first / "originals").exists()
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    setting = Setting(EncodeOptions(rate="coarse"))
    result = judged(codec, photos, second, setting=setting, cache=cache, against=first)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    assert len(kept) == 3
    against = result["against"]
    assert against["measures"] == other["measures"] and against["rate"] == "fine"
    for name, part in result["measures"].items():
        if part is None:
            assert against["differences"][name] is None
            continue
        found = against["differences"][name]
        expected = part["value"] - other["measures"][name]["value"]
        assert found["value"] == pytest.approx(expected, abs=1e-9), name
        assert found["interval"][0] <= found["value"] <= found["interval"][1]
    lines = (second / "realism.md").read_text().splitlines()
    assert "| fine |" in lines[3] and lines[4].startswith("| **difference** |")
    same = judged(codec, photos, first, cache=cache, against=first)
    for name, part in same["against"]["differences"].items():
        if part is not None:
            assert part["value"] == 0 and part["interval"] == [0, 0], name


def test_runs_over_other_crops_are_not_compared(codec, photos, tmp_path, fast):
    first = tmp_path / "first"
    with pytest.raises(ValueError, match="no finished run"):
        judged(codec, photos, tmp_path / "out", against=first)
    judged(codec, photos, first, Crops(32, 16, limit=2))
    for i, (crops, match) in enumerate(
        [(CROPS, "crops_digest"), (Crops(32, 8, limit=2), "stride is 16, not 8")]
    ):
        with pytest.raises(ValueError, match=f"cannot be compared: .*{match}"):
            judged(codec, photos, tmp_path / f"out{i}", crops, against=first)
        assert not (tmp_path / f"out{i}").exists()
    with pytest.raises(ValueError, match="1 of 4 photos have both sides of 41 pixels"):
        judged(codec, photos, tmp_path / "few", Crops(41, 16))


def test_missing_weights_give_no_value_and_the_way_to_get_them(
    codec, photos, tmp_path, monkeypatch
):
    def missing(name: str, device: str) -> None:
        raise MetricWeightsMissing("not installed")

    monkeypatch.setattr(metric_networks, "_load_network", missing)
    result = judged(codec, photos, tmp_path / "out", features=Means())
    assert result["measures"]["dists"] is None and result["measures"]["psnr"]
    assert any("pip install" in note for note in result["notes"])
    assert " – |" in (tmp_path / "out" / "realism.md").read_text()


def test_the_command_line_judges_held_out_photos(random_model, photos, tmp_path, fast, capsys):
    common = ("eval", "realism", photos, "--model", random_model, "--side", 32, "--stride", 16)
    one = ("--out", tmp_path / "one", "--rate", "fine", "--distances", 1)
    printed = output(capsys, *common, *one)
    assert printed == (tmp_path / "one" / "realism.md").read_text(encoding="utf-8")
    options = ("--rate", "coarse", "--distances", 1, "--steps", 1, "--seed", 5)
    again = (*common, "--out", tmp_path / "two", *options, "--against", tmp_path / "one")
    assert "**difference**" in output(capsys, *again, "--cache", tmp_path / "originals")
    result = json.loads((tmp_path / "two" / "realism.json").read_text())
    assert (result["rate"], result["steps"], result["seed"]) == ("coarse", 1, 5)
    assert result["crops_with_distances"] == len(list((tmp_path / "originals").iterdir())) == 3
    message = failure(capsys, *common, "--out", tmp_path / "one", "--rate", "coarse")
    assert "eval realism: " in message and "holds another run" in message
