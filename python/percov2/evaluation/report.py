"""Round trips of pictures, and reports with measures and side-by-side pictures."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from percov2.codec import Codec
from percov2.evaluation.baselines import BASELINES
from percov2.evaluation.comparisons import Comparison, Comparisons, versions
from percov2.evaluation.gallery import Cell, reduced, write_page
from percov2.evaluation.metrics import HIGHER_IS_BETTER, METRICS, Original, measure
from percov2.evaluation.report_page import markdown
from percov2.evaluation.rivals import Rival, check_names
from percov2.evaluation.setting import (
    Setting,
    compress,
    digest,
    facts_of_run,
    restore,
)
from percov2.evaluation.writers import cell, write_json
from percov2.files import SUFFIX, check_kind, check_outputs, write_bytes, write_image
from percov2.images import read_image, to_rgb
from percov2.machine import processor
from percov2.options import EncodeOptions

__all__ = [
    "RoundTrip",
    "evaluate",
    "facts_of",
    "means",
    "missing",
    "pictures_in",
    "pictures_of",
    "plan_evaluation",
    "plan_outputs",
    "round_trip",
    "sentence",
    "side_by_side",
    "warm_up",
    "wins",
    "write_round_trip",
]

ROUNDTRIP_METRICS = ("psnr", "ms_ssim", "lpips_alex")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm")


@dataclass
class RoundTrip:
    """A picture that was compressed and restored, with its measures.

    Attributes:
        original: the picture in sRGB, as the codec received it.
        measured: the original, for further measurements.
        restored: the restored picture.
        file: the compressed file.
        record: image, bytes, bpp, the measures, and encode_s and decode_s in seconds.
        notes: the reasons for missing measures.
    """

    original: Image.Image
    measured: Original
    restored: Image.Image
    file: bytes
    record: dict[str, Any]
    notes: list[str]


def warm_up(codec: Codec, setting: Setting) -> None:
    """Load every network of a setting, so that measured times do not include loading."""
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    whole = EncodeOptions(rate=setting.encode.rate, schedule=setting.encode.schedule)
    restore(codec, compress(codec, grey, replace(setting, encode=whole)), setting)


def round_trip(
    codec: Codec, path: Path, setting: Setting, metrics: Sequence[str] = ROUNDTRIP_METRICS
) -> RoundTrip:
    """Compress, restore and measure one picture file. Warnings of ``to_rgb`` name its path.

    Raises ValueError if the file is not a picture, and OSError if it cannot be read.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = to_rgb(read_image(path))
    for warning in caught:
        warnings.warn(f"{path}: {warning.message}", warning.category, stacklevel=2)
    started = time.perf_counter()
    picture = Image.fromarray(pixels)
    file = compress(codec, picture, setting)
    encoded = time.perf_counter()
    restored = restore(codec, file, setting)
    times = {"encode_s": encoded - started, "decode_s": time.perf_counter() - encoded}
    measured = Original(pixels)
    values, notes = measure(measured, np.asarray(restored), metrics)
    size = {"bytes": len(file), "bpp": 8 * len(file) / (picture.width * picture.height)}
    record: dict[str, Any] = {"image": str(path), **size, **values, **times}
    return RoundTrip(picture, measured, restored, file, record, notes)


_GAP = 8
"""Width between the pictures of ``side_by_side``."""


def side_by_side(pictures: Iterable[Image.Image], gap: int = _GAP) -> Image.Image:
    """Return one picture that shows the given pictures in a row on white."""
    row = list(pictures)
    width = sum(picture.width for picture in row) + gap * (len(row) - 1)
    page = Image.new("RGB", (width, max(picture.height for picture in row)), "white")
    left = 0
    for picture in row:
        page.paste(picture, (left, 0))
        left += picture.width + gap
    return page


_PER_PICTURE = (".pcv2", ".png", "_compare.png")
_PER_REPORT = ("report.json", "report.md", "report.html", "gallery.jpg")


def write_round_trip(trip: RoundTrip, folder: Path, stem: str) -> None:
    """Write STEM.pcv2, STEM.png (restored) and STEM_compare.png (original | restored).

    STEM stands for ``stem``, and the files are written to ``folder``.
    """
    file, restored, compare = (folder / (stem + ending) for ending in _PER_PICTURE)
    write_bytes(file, trip.file)
    write_image(trip.restored, restored)
    write_image(side_by_side([trip.original, trip.restored]), compare)


def plan_outputs(paths: Sequence[Path], out: Path, reports: Sequence[str] = ()) -> list[str]:
    """Return the pictures' names without folder and ending, which name their results in ``out``.

    ``reports`` names further files that will be written to ``out``. Raises ValueError if two
    pictures share a name, or if a result would overwrite a picture or another result.
    """
    stems = [path.stem for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        if stems.count(stem) > 1:
            raise ValueError(f"{path}: another picture is named {stem!r} too; rename one of them")
    names = [*reports, *(stem + ending for stem in stems for ending in _PER_PICTURE)]
    outputs = [out / name for name in names]
    check_outputs(outputs, paths)
    for output in outputs:
        if output.suffix in (SUFFIX, ".png"):
            try:
                check_kind(output, compressed=output.suffix == SUFFIX)
            except ValueError as error:
                raise ValueError(f"{output}: {error}") from error
    return stems


def pictures_in(folder: Path) -> list[Path]:
    """Return the picture files of a folder, sorted by name. Raise ValueError if there is none."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_ENDINGS)
    if not found:
        raise ValueError(f"no picture in {folder}; the endings are {', '.join(PICTURE_ENDINGS)}")
    return found


def plan_evaluation(
    folder: Path, out: Path, baselines: Sequence[str] = (), rivals: Sequence[Rival] = ()
) -> tuple[list[Path], list[str]]:
    """Return the pictures of a folder and the names of their results in ``out``.

    The function makes ``out`` if it is missing. Raises ValueError if there is no picture, if a
    baseline is unknown, if two rivals have one name or if a result would overwrite a file, OSError
    if a folder cannot be read or made, and the errors of ``Folder.check``.
    """
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise ValueError(f"unknown baselines {unknown}; choose from {', '.join(BASELINES)}")
    check_names(rivals)
    paths = pictures_in(folder)
    for rival in rivals:
        rival.check(paths)
    out.mkdir(parents=True, exist_ok=True)
    return paths, plan_outputs(paths, out, _PER_REPORT)


def facts_of(
    codec: Codec,
    paths: Sequence[Path],
    setting: Setting,
    baselines: Sequence[str] = (),
    rivals: Sequence[Rival] = (),
) -> dict[str, Any]:
    """Return everything that determines a report, as JSON values.

    A change in the program of a rival's command is not seen.
    """
    found = [name for name in baselines if BASELINES[name].available()]
    packages = ["numpy", "pillow", "torch", *(BASELINES[name].package for name in found)]
    return {
        **facts_of_run(codec, setting),
        "software": {"python": platform.python_version(), **versions(packages)},
        "photos": {path.name: digest(path.read_bytes()) for path in paths},
        "codecs": found,
        "rivals": [[rival.name, rival.source, rival.state(paths)] for rival in rivals],
    }


def evaluate(
    codec: Codec,
    folder: Path,
    out: Path,
    setting: Setting,
    baselines: Sequence[str] = (),
    progress: bool = True,
    rivals: Sequence[Rival] = (),
    kept: Path | None = None,
) -> dict[str, Any]:
    """Compress, restore and measure all pictures of a folder, and write a report to ``out``.

    The files are report.json, report.md and, per picture, STEM.pcv2, STEM.png and STEM_compare.png
    (original | restored | baselines | rivals). With baselines, gallery.jpg shows all pictures at
    half size: original | restored | the baseline that is best by LPIPS-VGG.

    Each of ``baselines`` (names from ``BASELINES``) may use as many bytes as percov2 used. For each
    metric, the report shows the baseline at the scale that is best by that metric. A baseline's
    bytes are those of its largest file. The picture shown is the best by LPIPS-VGG, or by PSNR if
    LPIPS-VGG is missing. A baseline that is not installed is left out, and a note says how to
    install it. ``rivals`` are measured at their own number of bytes. Results of baselines and
    rivals are kept in the folder ``kept`` and taken from there; None keeps none.

    Returns the contents of report.json: setting, images, means, notes and baselines. "baselines"
    holds baselines and rivals; "kind" tells them apart ("codec", "command" or "folder"), and the
    operating points of one "system" form a curve. The "wins" are the number of pictures on which
    percov2 is better, by metric. Raises the errors of
    ``plan_evaluation``, ``round_trip`` and ``Rival.restore``.
    """
    paths, stems = plan_evaluation(folder, out, baselines, rivals)
    facts = facts_of(codec, paths, setting, baselines, rivals)
    notes = missing(baselines)
    comparisons = Comparisons(kept)
    warm_up(codec, setting)
    records: list[dict[str, Any]] = []
    others: dict[str, list[dict[str, Any]]] = {name: [] for name in facts["codecs"]}
    others |= {rival.name: [] for rival in rivals}
    gallery: list[list[Cell]] = []
    pictures: list[tuple[str, str]] = []
    for path, stem in zip(tqdm(paths, disable=not progress), stems, strict=True):
        try:
            trip = round_trip(codec, path, setting, METRICS)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        write_round_trip(trip, out, stem)
        records.append({**trip.record, "image": path.name})
        notes += trip.notes
        photo, size = trip.measured, len(trip.file)
        known = [metric for metric in METRICS if trip.record[metric] is not None]
        found = {name: comparisons.within(name, photo, size, known) for name in facts["codecs"]}
        fitting = {name: one for name, one in found.items() if one is not None}
        if fitting:
            gallery.append(_gallery_row(stem, trip, fitting))
        fitting |= {r.name: comparisons.by_rival(r, photo, path, known) for r in rivals}
        for name, one in fitting.items():
            others[name].append({"image": path.name, **one.record})
        if fitting:
            row = [trip.original, trip.restored, *(one.shown for one in fitting.values())]
            write_image(side_by_side(row), out / f"{stem}_compare.png")
        systems = ["original", "percov2", *fitting]
        pictures.append((f"{stem}: {', '.join(systems)}", f"{stem}_compare.png"))
    for name in facts["codecs"]:
        if absent := len(records) - len(others[name]):
            notes.append(f"{name} has no file that small for {absent} of {len(records)} pictures")
    kinds = {name: {"kind": "codec", "system": name} for name in facts["codecs"]}
    kinds |= {
        rival.name: {"kind": rival.kind, "system": rival.system, "source": rival.source}
        for rival in rivals
    }
    report = {
        **facts,
        "processor": processor(),
        "mean": means(records),
        "images": records,
        "baselines": {
            name: {**kinds[name], "mean": means(rows), "wins": wins(records, rows), "images": rows}
            for name, rows in others.items()
        },
        "notes": sorted(set(notes)),
    }
    write_json(out / "report.json", report)
    if gallery:
        write_page(gallery, out / "gallery.jpg")
        pictures.insert(0, (GALLERY, "gallery.jpg"))
    write_bytes(out / "report.md", markdown([report], pictures).encode(errors="backslashreplace"))
    return report


GALLERY = (
    "The original, percov2, and the best classical codec at no more bytes, by LPIPS (VGG), at half "
    "their size"
)
"""The title of gallery.jpg."""


def _gallery_row(stem: str, trip: RoundTrip, found: dict[str, Comparison]) -> list[Cell]:
    """Return a photo, percov2's copy and that of the best classical codec, at half size."""
    name, best = min(found.items(), key=lambda one: one[1].distance)
    cells = [
        (stem, trip.original),
        (f"percov2, {len(trip.file):,} bytes", trip.restored),
        (f"{name}, {best.record['shown_bytes']:,} bytes", best.shown),
    ]
    return [(label, reduced(picture, 2)) for label, picture in cells]


def missing(baselines: Sequence[str]) -> list[str]:
    """Return a note for each baseline that is not installed, with the command that installs it."""
    return [
        f"{name} was not measured: it is not installed ({BASELINES[name].install})"
        for name in baselines
        if not BASELINES[name].available()
    ]


def pictures_of(report: dict[str, Any], folder: Path, image: str) -> list[Cell]:
    """Return the original, percov2's picture and those of all codecs, cut from STEM_compare.png.

    The labels are "original" and those of ``systems_of``; ``folder`` holds the report's files.
    Raises OSError if the file is missing, and ValueError if it does not match the report.
    """
    path = folder / f"{Path(image).stem}_compare.png"
    labels = ["original", *(name for name, _ in systems_of(report, image))]
    page = Image.fromarray(to_rgb(read_image(path)))
    width = (page.width + _GAP) // len(labels) - _GAP
    if width < 1 or len(labels) * (width + _GAP) - _GAP != page.width:
        raise ValueError(f"{path} does not show {len(labels)} pictures: {', '.join(labels)}")
    lefts = (i * (width + _GAP) for i in range(len(labels)))
    cut = (page.crop((left, 0, left + width, page.height)) for left in lefts)
    return list(zip(labels, cut, strict=True))


def systems_of(report: dict[str, Any], image: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and the record of every system that coded a picture, percov2 first."""
    named = [(f"percov2 {report['rate']}", report["images"])]
    named += [(name, entry["images"]) for name, entry in report["baselines"].items()]
    return [(name, row) for name, rows in named for row in rows if row["image"] == image]


def means(records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean of every numeric column. The mean is None if a value is missing."""
    columns = {key: [record[key] for record in records] for key in (records[0] if records else {})}
    columns.pop("image", None)
    return {key: None if None in x else float(np.mean(x)) for key, x in columns.items()}


def wins(
    records: Sequence[dict[str, Any]], rivals: Sequence[dict[str, Any]]
) -> dict[str, int | None]:
    """Count, for each metric, the pictures on which a record is better than its rival.

    A picture without a rival counts as better. The count is None if a value is missing.
    """
    others = {rival["image"]: rival for rival in rivals}
    result: dict[str, int | None] = {}
    for metric in METRICS:
        sign = 1 if metric in HIGHER_IS_BETTER else -1
        pairs = [
            (r[metric], others.get(r["image"], {metric: -sign * np.inf})[metric]) for r in records
        ]
        missing = any(value is None for pair in pairs for value in pair)
        result[metric] = None if missing else sum(sign * a > sign * b for a, b in pairs)
    return result


def sentence(record: dict[str, Any]) -> str:
    """Return the record of a round trip as one line."""
    return (
        f"{record['image']}: {record['bytes']} bytes, {record['bpp']:.4f} bpp, "
        f"PSNR {cell('{:.2f} dB', record['psnr'])}, MS-SSIM {cell('{:.4f}', record['ms_ssim'])}, "
        f"LPIPS {cell('{:.3f}', record['lpips_alex'])}, "
        f"encode {record['encode_s']:.2f} s, decode {record['decode_s']:.2f} s"
    )
