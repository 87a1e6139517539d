"""Copies of a photo by other codecs, with their measures, which can be kept between evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from percov2 import __version__
from percov2.evaluation.baselines import BASELINES, Attempt, attempts_within, best_of
from percov2.evaluation.metrics import METRICS, Original
from percov2.evaluation.rivals import Rival
from percov2.evaluation.setting import digest
from percov2.evaluation.writers import write_json
from percov2.files import write_image
from percov2.images import read_image, to_rgb
from percov2.stored_files import read_json

__all__ = ["Comparison", "Comparisons", "versions"]


@dataclass(frozen=True)
class Comparison:
    """A photo coded by another codec.

    Attributes:
        record: bytes, bpp, shown_bytes and the measures; of a command also "seconds". For each
            metric, the best attempt counts, and "bytes" is the size of the largest of these.
        shown: the restored picture to show. It has ``shown_bytes`` and is the best attempt by
            LPIPS-VGG, or by PSNR if LPIPS-VGG is missing.
    """

    record: dict[str, Any]
    shown: Image.Image

    @property
    def distance(self) -> float:
        """Return LPIPS-VGG of the shown picture, or the negative of PSNR if it is missing."""
        nearness = self.record["psnr"]
        without = math.inf if nearness is None else -nearness
        distance = self.record["lpips_vgg"]
        return without if distance is None else float(distance)


class Comparisons:
    """Comparisons, each of which is made once for a photo, a codec and a number of bytes.

    Args:
        folder: where they are kept, made if missing; None to keep none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def within(
        self, name: str, photo: Original, size: int, metrics: Sequence[str]
    ) -> Comparison | None:
        """Return what a classical codec makes of a photo in at most ``size`` bytes.

        ``metrics`` are those that this machine can measure on the photo: kept comparisons that lack
        one do not count. The result is None if no scale fits.
        """

        def made() -> Comparison | None:
            attempts = attempts_within(name, Image.fromarray(photo.pixels), size)
            return _compared(photo, attempts) if attempts else None

        packages = versions([BASELINES[name].package])
        return self._kept(("codec", name, packages, size, tuple(metrics)), photo, made)

    def by_rival(
        self, rival: Rival, photo: Original, path: Path, metrics: Sequence[str]
    ) -> Comparison:
        """Return what a rival makes of the photo of ``path``. Errors are those of ``restore``."""

        def made() -> Comparison:
            attempt, seconds = rival.restore(Image.fromarray(photo.pixels), path)
            found = _compared(photo, [attempt])
            if seconds is not None:
                found.record["seconds"] = seconds
            return found

        key = (rival.kind, rival.name, rival.source, rival.state([path]), tuple(metrics))
        found = self._kept(key, photo, made)
        assert found is not None
        return found

    def _kept(
        self, key: tuple[Any, ...], photo: Original, made: Callable[[], Comparison | None]
    ) -> Comparison | None:
        if self._folder is None:
            return made()
        texts = repr((__version__, *key)), str(photo.pixels.shape)
        name = digest(*(text.encode() for text in texts), photo.pixels.tobytes())
        path, shown = (self._folder / f"{name}.{ending}" for ending in ("json", "png"))
        if path.is_file():
            record = read_json(path)
            if record is None:
                return None
            return Comparison(record, Image.fromarray(to_rgb(read_image(shown))))
        found = made()
        self._folder.mkdir(parents=True, exist_ok=True)
        if found is not None:
            write_image(found.shown, shown)
        write_json(path, None if found is None else found.record)
        return found


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of installed packages; those that are missing are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _compared(photo: Original, attempts: list[Attempt]) -> Comparison:
    best = best_of(photo, attempts)
    size = max((attempt.size for _, attempt in best.values()), default=attempts[0].size)
    _, shown = best.get("lpips_vgg") or best.get("psnr") or (math.inf, attempts[0])
    bpp = 8 * size / np.prod(photo.pixels.shape[:2])
    record: dict[str, Any] = {"bytes": size, "bpp": float(bpp), "shown_bytes": shown.size}
    record |= {metric: best[metric][0] if metric in best else None for metric in METRICS}
    return Comparison(record, shown.restored)
