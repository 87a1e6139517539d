"""Made-up reports of ``percov2 eval kodak`` with their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from percov2.evaluation.metrics import METRICS
from percov2.evaluation.report import means, side_by_side
from tools.photos import noise

IMAGES = ("a.png", "b.png")


def picture(seed: int) -> Image.Image:
    return noise(32, 48, seed=seed)


def row(image: str, size: int, quality: float) -> dict[str, Any]:
    """A record whose metrics follow from ``quality``, 0..1; LPIPS (VGG) is missing."""
    values = [20 + 10 * quality, quality, 1 - quality, None, (1 - quality) / 2]
    bpp = {"bytes": size, "bpp": 8 * size / (32 * 48)}
    return {"image": image, **bpp, **dict(zip(METRICS, values, strict=True))}


def write_report(folder: Path, rate: str, size: int, quality: float, **rivals: Any) -> Path:
    """Write report.json and the pictures of a rate, and return the path of report.json.

    ``rivals`` are (kind, system, source, size, quality) by name. Each system's picture of image i
    is ``picture(10 * j + i)``, where j is 0 for the original and counts the systems.
    """
    folder.mkdir(parents=True)
    images = [row(image, size + i, quality) for i, image in enumerate(IMAGES)]
    baselines: dict[str, Any] = {}
    for name, (kind, system, source, bytes_, worth) in rivals.items():
        count = 1 if name == "few" else len(IMAGES)
        rows = [row(image, bytes_ + i, worth) for i, image in enumerate(IMAGES[:count])]
        entry = {"kind": kind, "system": system, "source": source, "mean": means(rows)}
        baselines[name] = {**entry, "wins": dict.fromkeys(METRICS, 1), "images": rows}
    report = {
        "percov2": "0.0",
        "model": "small",
        "rate": rate,
        "schedule": "qlds12",
        "steps": 1,
        "mean": means(images),
        "images": images,
        "baselines": baselines,
        "notes": ["a <note> & more"],
    }
    path = folder / "report.json"
    path.write_text(json.dumps(report))
    for i, image in enumerate(IMAGES):
        held = [n for n, entry in baselines.items() if len(entry["images"]) > i]
        shown = [picture(10 * j + i) for j in range(2 + len(held))]
        side_by_side(shown).save(folder / f"{Path(image).stem}_compare.png")
    return path
