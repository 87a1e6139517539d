"""Quality and realism of held-out photos after a codec, with confidence intervals.

Photos are compressed and restored whole, one at a time. The original and the restored photo are
then cut into the same crops and compared. The measures of each photo are stored at once, so an
interrupted run resumes.

The judge of realism is EfficientNet-Lite0 (``percov2.evaluation.realism``). No loss uses it, so no
model can overfit to it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from tqdm import tqdm

from percov2.codec import Codec
from percov2.evaluation.judge_report import as_json, differences, estimates, joined, page
from percov2.evaluation.metrics import METRICS, measure_batch
from percov2.evaluation.photo_bootstrap import PhotoBootstrap
from percov2.evaluation.realism import lite_features
from percov2.evaluation.setting import (
    Setting,
    compress,
    digest,
    facts_of_run,
    network_digest,
    restore,
)
from percov2.evaluation.writers import write_json
from percov2.files import read_arrays, write_bytes

if TYPE_CHECKING:
    from percov2.photos import Photo, PhotoCrops

__all__ = ["Crops", "judge_realism"]

_ON_ALL_CROPS = ("psnr", "ms_ssim")
_PHOTOS, _SETTINGS = "photos", "settings.json"
"""Name of the folder and of the file that hold a run's results."""
_CROPS = ("side", "stride")
_BATCH = 8
"""Number of crops per call of the judge."""


@dataclass(frozen=True)
class Crops:
    """The choice of photos and of their crops.

    Attributes:
        side: side of a crop in pixels. Photos with a shorter side are left out.
        stride: distance between crops in pixels, at most ``side``. The last row and the last column
            of crops end at the photo's edge, so that the crops cover the photo.
        distances: number of crops per photo for LPIPS and DISTS. The crops are sorted by the
            SHA-256 of the photo's key and the crop's number, and the first are taken. None takes
            all crops.
        limit: number of photos, at least 2. The photos are sorted by the SHA-256 of their keys, and
            the first are taken. None takes all photos.

    Raises:
        ValueError: a number is out of range.
    """

    side: int = 256
    stride: int = 128
    distances: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.side:
            raise ValueError(f"stride must be 1 to the side of {self.side}, not {self.stride}")
        if self.distances is not None and self.distances < 1:
            raise ValueError(f"distances must be at least 1, not {self.distances}")
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"limit must be at least 2 photos, not {self.limit}")

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the (top, left) corners of a photo's crops, row by row."""
        ends = (height - self.side, width - self.side)
        return list(product(*([*range(0, end, self.stride), end] for end in ends)))

    def cut(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the crops [N, side, side, 3] of a photo [H, W, 3]."""
        side, corners = self.side, self.corners(*pixels.shape[:2])
        return np.stack([pixels[top : top + side, left : left + side] for top, left in corners])

    def with_distances(self, key: str, count: int) -> list[int]:
        """Return the numbers of a photo's crops for LPIPS and DISTS, in ascending order.

        ``key`` is the photo's key, and ``count`` is its number of crops.
        """
        order = sorted(range(count), key=lambda i: _shuffled(f"{key}:{i}"))
        return sorted(order[: self.distances])

    def photos(self, photos: PhotoCrops) -> list[Photo]:
        """Return the photos that are large enough, in the order of ``limit``.

        Raises ValueError if there are fewer than two.
        """
        large = [p for p in photos.photos if min(p.height, p.width) >= self.side]
        if len(large) < 2:
            raise ValueError(
                f"{len(large)} of {len(photos.photos)} photos have both sides of {self.side} "
                "pixels or more, but two are needed; choose a smaller side"
            )
        return sorted(large, key=lambda p: _shuffled(p.key))


def _shuffled(name: str) -> bytes:
    """Return the key that sorts names in a fixed pseudo-random order."""
    return hashlib.sha256(name.encode()).digest()


def judge_realism(
    codec: Codec,
    photos: PhotoCrops,
    out: Path,
    setting: Setting | None = None,
    crops: Crops | None = None,
    cache: Path | None = None,
    against: Path | None = None,
    features: nn.Module | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compress and restore photos, measure their crops, and write realism.json and realism.md.

    The networks run on the codec's device.

    Args:
        codec: the codec to judge.
        photos: the held-out photos.
        out: folder for the results of one run, made if missing. Measures in it are kept. Between
            calls only ``limit`` may change, not the setting, the model or the photos.
        setting: options of the codec. None means the defaults.
        crops: choice of crops. None means the defaults.
        cache: folder for the originals' features, which several runs may share. None means
            OUT/originals.
        against: ``out`` of a finished run on the same crops, for a paired comparison, or None.
        features: judge that maps uint8 [B, 3, H, W] to [B, D]. None means EfficientNet-Lite0.
        progress: True to show the progress.

    Returns:
        The contents of realism.json.

    Raises:
        ValueError: there are too few photos, ``out`` holds a run of other photos, setting or model,
            or ``against`` holds no finished run on the same crops.
        MetricWeightsMissing: the judge's weights are missing.
    """
    setting, crops = setting or Setting(), crops or Crops()
    large = crops.photos(photos)
    judge = (lite_features() if features is None else features).eval().to(codec.model.device)
    names = [
        digest(p.key.encode(), f"{p.height}x{p.width}".encode(), photos.pixels(p).tobytes())
        for p in large
    ]
    facts = _facts(codec, setting, crops, judge, names)
    chosen = list(zip(large, names, strict=True))[: crops.limit]
    taken = [name for _, name in chosen]
    if against is not None:
        rival, rival_photos = _finished(against, facts, taken)
    _claim(out, facts)
    cached = cache or out / "originals"
    known = digest(*(str(facts[key]).encode() for key in (*_CROPS, "judge", "device")))
    originals = []
    for photo, name in tqdm(chosen, unit="photo", disable=not progress):
        pixels = np.array(photos.pixels(photo))
        cut = crops.cut(pixels)
        path = cached / f"{name}-{known}.npz"
        if not path.is_file():
            _save(path, {"features": _seen(judge, cut, codec.model.device)})
        originals.append(read_arrays(path)["features"].astype(np.float64))
        path = out / _PHOTOS / f"{name}.npz"
        if not path.is_file():
            _save(path, _measured(codec, setting, crops, judge, photo.key, pixels, cut))
    stored = [read_arrays(out / _PHOTOS / f"{name}.npz") for name in taken]
    run, notes = joined(stored), [str(note) for photo in stored for note in photo["notes"]]
    seen = np.concatenate(originals)
    bootstrap = PhotoBootstrap(np.repeat(np.arange(len(originals)), [len(x) for x in originals]))
    own = estimates(run, seen, bootstrap)
    result = {
        **facts,
        "threads": torch.get_num_threads(),
        "limit": crops.limit,
        "photos": len(taken),
        "photos_large_enough": len(large),
        "photos_given": len(photos.photos),
        "crops": len(seen),
        "crops_with_distances": sum(len(photo["with_distances"]) for photo in stored),
        "crops_digest": digest(*(name.encode() for name in taken)),
        "mean_bytes": float(np.mean([int(photo["file_bytes"]) for photo in stored])),
        "measures": as_json(own),
        "against": None,
        "notes": sorted(set(notes)),
    }
    if against is not None:
        other = joined(rival_photos)
        theirs = estimates(other, seen, bootstrap)
        found = differences(run, other, own, theirs, bootstrap)
        result["against"] = {**rival, "against": None, "differences": as_json(found)}
    write_json(out / "realism.json", result)
    write_bytes(out / "realism.md", page(result).encode())
    return result


def _measured(
    codec: Codec,
    setting: Setting,
    crops: Crops,
    judge: nn.Module,
    key: str,
    pixels: NDArray[np.uint8],
    cut: NDArray[np.uint8],
) -> dict[str, Any]:
    """Compress and restore one photo. Return the arrays to store."""
    file = compress(codec, Image.fromarray(pixels), setting)
    restored = crops.cut(np.asarray(restore(codec, file, setting)))
    device = codec.model.device
    values, notes = measure_batch(cut, restored, _ON_ALL_CROPS)
    chosen = crops.with_distances(key, len(cut))
    networks = [name for name in METRICS if name not in _ON_ALL_CROPS]
    distances, more = measure_batch(cut[chosen], restored[chosen], networks, device)
    for name, found in distances.items():
        values[name] = np.full(len(cut), np.nan)
        values[name][chosen] = found
    return {
        **values,
        "features": _seen(judge, restored, device),
        "file_bytes": len(file),
        "pixels": pixels.shape[0] * pixels.shape[1],
        "with_distances": chosen,
        "notes": np.array([*notes, *more], dtype=np.str_),
    }


def _seen(judge: nn.Module, crops: NDArray[np.uint8], device: str) -> NDArray[np.float32]:
    """Return the judge's features, float32 [N, D], of the crops, uint8 [N, S, S, 3]."""
    images = torch.from_numpy(crops).permute(0, 3, 1, 2)
    with torch.inference_mode():
        parts = [judge(part.to(device)).float().cpu() for part in images.split(_BATCH)]
    return torch.cat(parts).numpy()


def _facts(
    codec: Codec, setting: Setting, crops: Crops, judge: nn.Module, names: Sequence[str]
) -> dict[str, Any]:
    """Return everything that determines a photo's measures, as JSON values."""
    try:
        torchmetrics = metadata.version("torchmetrics")
    except metadata.PackageNotFoundError:
        torchmetrics = None
    return {
        **facts_of_run(codec, setting),
        **{name: getattr(crops, name) for name in (*_CROPS, "distances")},
        "judge": getattr(judge, "title", type(judge).__name__),
        "judge_weights": network_digest(judge),
        "photos_digest": digest(*(name.encode() for name in names)),
        "torch": torch.__version__,
        "torchmetrics": torchmetrics,
    }


def _claim(out: Path, facts: dict[str, Any]) -> None:
    """Reserve a folder for a run. Raise ValueError if it already holds another run."""
    path = out / _SETTINGS
    if path.is_file():
        _compare(f"{out} holds another run", json.loads(path.read_text("utf-8")), facts, facts)
        return
    (out / _PHOTOS).mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def _finished(
    folder: Path, facts: dict[str, Any], names: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return realism.json and the stored photos of a finished run, or raise ValueError."""
    path = folder / "realism.json"
    if not path.is_file():
        raise ValueError(f"{folder} contains no finished run: it has no realism.json")
    rival = json.loads(path.read_text("utf-8"))
    expected = {**facts, "crops_digest": digest(*(name.encode() for name in names))}
    same = (*_CROPS, "distances", "judge", "judge_weights", "crops_digest")
    _compare(f"{folder} cannot be compared", rival, expected, same)
    return rival, [read_arrays(folder / _PHOTOS / f"{name}.npz") for name in names]


def _compare(
    complaint: str, found: Mapping[str, Any], expected: Mapping[str, Any], keys: Iterable[str]
) -> None:
    unlike = [
        f"{key} is {found.get(key)!r}, not {expected[key]!r}"
        for key in keys
        if found.get(key) != expected[key]
    ]
    if unlike:
        raise ValueError(f"{complaint}: {'; '.join(unlike)}")


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_bytes(path, stream.getvalue())
