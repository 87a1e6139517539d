"""Published points of other systems: figures that their authors or others have published.

They were not measured by percov2. Pictures, crops, metrics and protocols may differ from those of
``percov2 eval``, so a published point is always marked and never joined to a measured one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

__all__ = ["PUBLISHED_METRICS", "PublishedPoint", "datasets", "published", "sources"]

PUBLISHED_METRICS = ("psnr", "ms_ssim", "lpips_alex", "dists", "fid", "kid")
"""The metrics of published.csv."""


@dataclass(frozen=True)
class PublishedPoint:
    """A published operating point of a system on a data set.

    Attributes:
        dataset: the data set, as the source names it.
        system: the system.
        point: the name of the operating point, or "".
        bpp: bits per pixel, or None for a system that codes nothing.
        values: the published metrics by name; see ``PUBLISHED_METRICS``.
        source: the publication, or the repository and the file.
    """

    dataset: str
    system: str
    point: str
    bpp: float | None
    values: dict[str, float]
    source: str


@lru_cache(maxsize=1)
def _points() -> tuple[PublishedPoint, ...]:
    text = (files("percov2.evaluation") / "published.csv").read_text(encoding="utf-8")
    return tuple(
        PublishedPoint(
            dataset=row["dataset"],
            system=row["system"],
            point=row["point"],
            bpp=float(row["bpp"]) if row["bpp"] else None,
            values={name: float(row[name]) for name in PUBLISHED_METRICS if row[name]},
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def datasets() -> list[str]:
    """Return the names of the data sets."""
    return list(dict.fromkeys(point.dataset for point in _points()))


def published(
    dataset: str | None = None, metric: str | None = None, coded: bool = True
) -> list[PublishedPoint]:
    """Return the published points of a data set that have a metric, ordered by system and rate.

    Args:
        dataset: a name of ``datasets``, or None for all.
        metric: a name of ``PUBLISHED_METRICS``, or None for all.
        coded: leave out systems that code nothing and so have no rate.

    Raises ValueError for an unknown data set or metric.

    >>> [point.bpp for point in published("Kodak", "dists") if point.system == "StableCodec"]
    [0.0058, 0.025]
    """
    if dataset is not None and dataset not in datasets():
        raise ValueError(f"no published points of {dataset!r}; choose from {', '.join(datasets())}")
    if metric is not None and metric not in PUBLISHED_METRICS:
        raise ValueError(
            f"no published values of {metric!r}; choose from {', '.join(PUBLISHED_METRICS)}"
        )
    found = [
        point
        for point in _points()
        if (dataset is None or point.dataset == dataset)
        and (metric is None or metric in point.values)
        and not (coded and point.bpp is None)
    ]
    return sorted(found, key=lambda point: (point.dataset, point.system.lower(), point.bpp or 0.0))


def sources(points: Iterable[PublishedPoint]) -> dict[str, list[str]]:
    """Return the systems of each source, for the list below a figure or table."""
    found: dict[str, list[str]] = {}
    for point in points:
        systems = found.setdefault(point.source, [])
        if point.system not in systems:
            systems.append(point.system)
    return found
