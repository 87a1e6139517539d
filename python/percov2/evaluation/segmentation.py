"""Semantic segmentation of restored pictures: the mean intersection over union (mIoU).

Of each class, the intersection and the union of expected and found pixels are summed over the whole
set. The class's value is their ratio, and mIoU is the mean over the classes that occur in the
expected or in the found labels (Long et al. 2015, arXiv 1411.4038, §5). The networks are those of
transformers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from percov2.evaluation.setting import network_title
from percov2.extras import require
from percov2.files import read_arrays, write_bytes

__all__ = ["IGNORED", "ConfusionCounts", "Segmenter", "read_labels"]

IGNORED = 255
"""Expected label of pixels that do not count."""

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


def read_labels(path: Path, reduce: bool = False) -> Labels:
    """Return the labels [H, W] in a PNG file: its grey values or palette indices.

    With ``reduce``, 0 means no class and 1 is the first class, as in the files of ADE20K: 0 becomes
    255, and all other labels become one less. Raises ValueError for pictures in colour.
    """
    with Image.open(path) as image:
        if image.mode not in ("1", "L", "P", "I;16", "I"):
            raise ValueError(f"{path} holds no labels: its mode is {image.mode}, not grey")
        labels = np.asarray(image).astype(np.int64)
    if reduce:
        labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
    return labels


@dataclass(frozen=True, eq=False)
class ConfusionCounts:
    """The number of pixels of each expected class in which each class was found.

    Counts of shards add up to those of one run: ``sum(shards, ConfusionCounts.zeros(classes))``.

    Attributes:
        counts: int64 [expected classes, found classes].

    >>> expected = np.array([[0, 0], [1, 255]])
    >>> found = np.array([[0, 1], [1, 0]])
    >>> counts = ConfusionCounts.zeros(3) + ConfusionCounts.of(expected, found, 3)
    >>> counts.ious().tolist()  # no pixel is of class 2
    [0.5, 0.5, nan]
    >>> counts.mean_iou
    0.5
    """

    counts: NDArray[np.int64]

    @classmethod
    def zeros(cls, classes: int) -> ConfusionCounts:
        """Return the counts of no picture."""
        return cls(np.zeros((classes, classes), np.int64))

    @classmethod
    def of(cls, expected: Labels, found: Labels, classes: int) -> ConfusionCounts:
        """Return the counts of one picture. Pixels whose expected label is 255 do not count.

        Raises ValueError if the labels differ in shape or are not below ``classes``.
        """
        if expected.shape != found.shape:
            raise ValueError(f"labels {found.shape} do not match labels {expected.shape}")
        counted = expected != IGNORED
        a, b = expected[counted].astype(np.int64), found[counted].astype(np.int64)
        for labels in (a, b):
            if labels.size and not 0 <= labels.min() <= labels.max() < classes:
                raise ValueError(f"label {labels.max()} is none of {classes} classes")
        pairs = np.bincount(a * classes + b, minlength=classes * classes)
        return cls(pairs.reshape(classes, classes))

    def __add__(self, other: ConfusionCounts) -> ConfusionCounts:
        if self.counts.shape != other.counts.shape:
            raise ValueError("counts of different numbers of classes cannot be added")
        return ConfusionCounts(self.counts + other.counts)

    def ious(self) -> NDArray[np.float64]:
        """Return the intersection over union of each class, or nan if the class does not occur."""
        both = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - both
        return np.divide(both, union, out=np.full(len(both), np.nan), where=union > 0)

    @property
    def mean_iou(self) -> float:
        """Return the mean over the classes that occur. Raise ValueError if none occurs."""
        values = self.ious()
        if np.isnan(values).all():
            raise ValueError("mIoU needs at least one pixel with a label")
        return float(np.nanmean(values))

    def save(self, path: Path) -> None:
        """Write the counts to an .npz file."""
        stream = io.BytesIO()
        np.savez(stream, counts=self.counts)
        write_bytes(path, stream.getvalue())

    @classmethod
    def load(cls, path: Path) -> ConfusionCounts:
        """Return the counts in a file of ``save``. Raise ValueError if it is damaged or another."""
        counts = read_arrays(path).get("counts")
        if counts is None or counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
            raise ValueError(f"{path} holds no counts of classes")
        return cls(counts.astype(np.int64))


class Segmenter:
    """A network of transformers that gives each pixel a class.

    The processor of the model resizes and normalizes a picture. The network's logits are resized
    bilinearly to the picture's size, and the class with the largest logit is the label.

    Args:
        location: a model's name on the hub or its folder, with its processor.
        device: device of the model.
        batch_size: number of pictures per call of the network. Pictures that the processor resizes
            to different sizes go one at a time.

    Attributes:
        classes: number of classes.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: the model cannot be loaded.
    """

    def __init__(self, location: str, device: str = "cpu", batch_size: int = 8) -> None:
        require("eval", "segmentation", "torch", "transformers")
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        if batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        try:
            network = AutoModelForSemanticSegmentation.from_pretrained(
                location, dtype=torch.float32, trust_remote_code=False
            )
            self._processor: Any = AutoImageProcessor.from_pretrained(
                location, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"cannot load the segmentation model {location}: {error}") from error
        self._network: Any = network.to(device).eval()
        self.title = network_title(str(location), network)
        self.device, self.batch_size = device, batch_size
        self.classes = int(network.config.num_labels)

    @torch.inference_mode()
    def labels(self, pictures: Pixels | Sequence[Pixels]) -> list[Labels]:
        """Return the labels [H, W] of pictures, uint8 [H, W, 3] of any sizes."""
        found: list[Labels] = []
        for start in range(0, len(pictures), self.batch_size):
            part = list(pictures[start : start + self.batch_size])
            inputs = [self._prepared(picture) for picture in part]
            alike = len({x.shape for x in inputs}) == 1
            for batch in [torch.cat(inputs)] if alike else inputs:
                logits = self._network(pixel_values=batch.to(self.device)).logits
                for own in logits:
                    size = part[len(found) - start].shape[:2]
                    larger = F.interpolate(own[None], size, mode="bilinear", align_corners=False)
                    found.append(larger.argmax(1)[0].cpu().numpy())
        return found

    def _prepared(self, picture: Pixels) -> torch.Tensor:
        image = Image.fromarray(picture)
        return self._processor(images=image, return_tensors="pt")["pixel_values"]

    def compare(
        self,
        originals: Pixels | Sequence[Pixels] | None,
        restored: Pixels | Sequence[Pixels],
        expected: Sequence[Labels] | None = None,
    ) -> ConfusionCounts:
        """Return the counts of the restored pictures' labels.

        The expected labels are those of the originals, or ``expected`` if given.
        """
        if expected is None:
            if originals is None:
                raise ValueError("a comparison needs originals or expected labels")
            expected = self.labels(originals)
        if len(expected) != len(restored):
            raise ValueError(f"{len(expected)} and {len(restored)} inputs do not pair")
        total = ConfusionCounts.zeros(self.classes)
        for one, other in zip(expected, self.labels(restored), strict=True):
            total += ConfusionCounts.of(one, other, self.classes)
        return total

    def describe(self) -> str:
        """Return the definition of mIoU with the model and the versions, for reports."""
        import transformers

        return (
            "mIoU (Long et al. 2015): intersection over union of each class, summed over the set; "
            "mean over the classes that occur in expected or found labels; label "
            f"{IGNORED} ignored. Model: {self.title}, "
            f"float32, {self.classes} classes, {type(self._processor).__name__}; logits resized "
            f"bilinearly. transformers {transformers.__version__}, torch {torch.__version__}."
        )
