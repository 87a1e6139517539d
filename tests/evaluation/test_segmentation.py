"""mIoU by hand and against a plain statement; labels of networks and of PNG files; shards."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

from percov2.evaluation import segmentation
from percov2.evaluation.segmentation import ConfusionCounts, Segmenter, read_labels
from tools import tiny_judges


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_judges.segmenter(tmp_path_factory.mktemp("segmenter"))


def pictures(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = [(48, 64), (64, 40), (48, 64), (33, 77), (64, 64)]
    coarse = [rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), np.uint8) for h, w in sizes]
    blocks = [x.repeat(8, 0).repeat(8, 1) for x in coarse]
    return [x[:h, :w] for x, (h, w) in zip(blocks, sizes, strict=True)]


def random_labels(seed: int, classes: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, classes, (7, 5 + i)) for i in range(6)]


def miou_in_plain_words(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Sum intersections and unions of each class over the set, by masks."""
    values = []
    for label in range(255):
        both = union = 0
        for a, b in zip(expected, found, strict=True):
            counted = a != 255
            both += ((a == label) & (b == label) & counted).sum()
            union += (((a == label) | (b == label)) & counted).sum()
        if union:
            values.append(both / union)
    return float(np.mean(values))


def counted(expected: list[np.ndarray], found: list[np.ndarray], classes: int) -> ConfusionCounts:
    parts = [ConfusionCounts.of(a, b, classes) for a, b in zip(expected, found, strict=True)]
    return sum(parts, ConfusionCounts.zeros(classes))


def test_miou_by_hand():
    expected = np.array([[0, 0, 1], [1, 2, 255]])
    found = np.array([[0, 1, 1], [1, 0, 2]])
    counts = ConfusionCounts.of(expected, found, 5)
    assert counts.counts[:3].tolist() == [[1, 1, 0, 0, 0], [0, 2, 0, 0, 0], [1, 0, 0, 0, 0]]
    # Class 0: 1 of 3, class 1: 2 of 3, class 2: 0 of 1; nothing is of class 3 or 4.
    np.testing.assert_allclose(counts.ious(), [1 / 3, 2 / 3, 0, np.nan, np.nan])
    assert counts.mean_iou == pytest.approx(1 / 3)
    only_found = ConfusionCounts.of(np.array([[0, 0]]), np.array([[0, 3]]), 5)
    assert only_found.mean_iou == pytest.approx(0.25)  # class 3 occurs in the found labels


def test_docstring_examples():
    assert doctest.testmod(segmentation) == (0, 5)


def test_sums_run_over_the_set_not_over_pictures():
    expected, found = random_labels(0), random_labels(1)
    expected[2][:3] = 255
    total = counted(expected, found, 6)
    assert total.mean_iou == pytest.approx(miou_in_plain_words(expected, found), rel=1e-12)
    alone = [ConfusionCounts.of(a, b, 6).mean_iou for a, b in zip(expected, found, strict=True)]
    assert np.mean(alone) != pytest.approx(total.mean_iou, rel=1e-3)


def test_merged_shards_equal_one_run(tmp_path):
    expected, found = random_labels(2), random_labels(3)
    whole = counted(expected, found, 4)
    for i, part in enumerate((slice(4, 6), slice(0, 1), slice(1, 4))):
        counted(expected[part], found[part], 4).save(tmp_path / f"{i}.npz")
    shards = [ConfusionCounts.load(tmp_path / f"{i}.npz") for i in range(3)]
    merged = sum(shards, ConfusionCounts.zeros(4))
    assert np.array_equal(merged.counts, whole.counts)
    assert merged.mean_iou == whole.mean_iou
    np.savez(tmp_path / "other.npz", counts=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="no counts of classes"):
        ConfusionCounts.load(tmp_path / "other.npz")


def test_unfit_labels_are_refused():
    zeros = np.zeros((2, 2), np.int64)
    for expected, found, match in [
        (zeros, zeros[:1], "do not match"),
        (zeros + 3, zeros, "label 3 is none of 3"),
        (zeros, zeros + 255, "label 255 is none of 3"),
    ]:
        with pytest.raises(ValueError, match=match):
            ConfusionCounts.of(expected, found, 3)
    with pytest.raises(ValueError, match="different numbers"):
        ConfusionCounts.zeros(3) + ConfusionCounts.zeros(4)
    with pytest.raises(ValueError, match="at least one pixel"):
        _ = ConfusionCounts.of(zeros + 255, zeros, 3).mean_iou


@pytest.mark.parametrize("palette", [False, True])
def test_labels_come_from_png_files(tmp_path, palette):
    labels = np.array([[0, 1, 255], [150, 2, 0]], np.uint8)
    image = Image.fromarray(labels)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(tmp_path / "labels.png")
    assert Image.open(tmp_path / "labels.png").mode == ("P" if palette else "L")
    assert read_labels(tmp_path / "labels.png").tolist() == labels.tolist()
    reduced = [[255, 0, 255], [149, 1, 255]]
    assert read_labels(tmp_path / "labels.png", reduce=True).tolist() == reduced
    image.convert("RGB").save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match="its mode is RGB"):
        read_labels(tmp_path / "colours.png")


def labels_in_plain_words(folder: Path, picture: np.ndarray) -> np.ndarray:
    """The labels of one picture by transformers' own way back to its size."""
    model = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=Image.fromarray(picture), return_tensors="pt"))
    sizes = [picture.shape[:2]]
    return processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0].numpy()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_networks_labels_are_those_of_transformers(folder, batch_size):
    judge, given = Segmenter(str(folder), batch_size=batch_size), pictures()
    found = judge.labels(given)
    assert judge.classes == tiny_judges.CLASSES
    assert len({int(label) for labels in found for label in labels.flat}) > 1
    for labels, picture in zip(found, given, strict=True):
        expected = labels_in_plain_words(folder, picture)
        assert labels.shape == expected.shape == picture.shape[:2]
        assert (labels == expected).mean() > 0.999  # batches may round ties otherwise


def test_miou_compares_with_originals_or_with_given_labels(folder):
    judge, given, restored = Segmenter(str(folder)), pictures(), pictures(1)
    assert judge.compare(given, given).mean_iou == 1
    counts = judge.compare(given, restored)
    plain = miou_in_plain_words(judge.labels(given), judge.labels(restored))
    assert counts.mean_iou == pytest.approx(plain, rel=1e-12)
    assert 0 < plain < 1
    files = [np.where(labels == 1, 255, labels) for labels in judge.labels(given)]
    counts = judge.compare(None, restored, files)
    plain = miou_in_plain_words(files, judge.labels(restored))
    assert counts.mean_iou == pytest.approx(plain, rel=1e-12)
    with pytest.raises(ValueError, match="originals or expected labels"):
        judge.compare(None, restored)
    with pytest.raises(ValueError, match="5 and 4 inputs"):
        judge.compare(given, restored[:4])


def test_missing_models_are_refused_and_the_description_names_versions(folder, tmp_path):
    with pytest.raises(ValueError, match="cannot load the segmentation model"):
        Segmenter(str(tmp_path))
    text = Segmenter(str(folder)).describe()
    for part in (
        "Long et al. 2015",
        "5 classes",
        f"{folder.name}, weights ",
        transformers.__version__,
    ):
        assert part in text
