"""Round trips of pictures, and reports with measures and side-by-side pictures."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from percov2 import __version__
from percov2.codec import Codec
from percov2.evaluation.baselines import BASELINES, Attempt, attempts_within, best_of
from percov2.evaluation.gallery import Cell, half_size, write_page
from percov2.evaluation.metrics import HIGHER_IS_BETTER, METRICS, Original, measure
from percov2.evaluation.setting import Setting, compress, described, restore
from percov2.images import check_outputs, read_image, to_rgb, write_bytes, write_image
from percov2.options import EncodeOptions

__all__ = [
    "RoundTrip",
    "evaluate",
    "markdown",
    "means",
    "pictures_in",
    "plan_evaluation",
    "plan_outputs",
    "round_trip",
    "sentence",
    "side_by_side",
    "table",
    "warm_up",
    "wins",
    "write_round_trip",
]

ROUNDTRIP_METRICS = ("psnr", "ms_ssim", "lpips_alex")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm")


@dataclass
class RoundTrip:
    """One picture, compressed and restored.

    Attributes:
        original: sRGB picture given to the codec.
        measured: the original, for further measurements.
        restored: restored picture of the same size.
        file: compressed file.
        record: image, bytes, bpp, the measures, encode_s and decode_s (seconds).
        notes: reasons for missing measures.
    """

    original: Image.Image
    measured: Original
    restored: Image.Image
    file: bytes
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def warm_up(codec: Codec, setting: Setting) -> None:
    """Load every network of a setting, so that times do not include loading."""
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    whole = EncodeOptions(rate=setting.encode.rate, schedule=setting.encode.schedule)
    file = compress(codec, grey, replace(setting, encode=whole))
    restore(codec, file, setting)


def round_trip(
    codec: Codec, path: Path, setting: Setting, metrics: Sequence[str] = ROUNDTRIP_METRICS
) -> RoundTrip:
    """Compress and restore one picture file; warnings of ``to_rgb`` name its path.

    Raises:
        ValueError: the file is not a picture.
        OSError: the file cannot be read.
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
    decoded = time.perf_counter()
    measured = Original(pixels)
    values, notes = measure(measured, np.asarray(restored), metrics)
    record: dict[str, Any] = {
        "image": str(path),
        "bytes": len(file),
        "bpp": 8 * len(file) / (pixels.shape[0] * pixels.shape[1]),
        **values,
        "encode_s": encoded - started,
        "decode_s": decoded - encoded,
    }
    return RoundTrip(picture, measured, restored, file, record, notes)


def side_by_side(pictures: Iterable[Image.Image], gap: int = 8) -> Image.Image:
    """Return pictures in a row on white."""
    row = list(pictures)
    width = sum(picture.width for picture in row) + gap * (len(row) - 1)
    page = Image.new("RGB", (width, max(picture.height for picture in row)), "white")
    left = 0
    for picture in row:
        page.paste(picture, (left, 0))
        left += picture.width + gap
    return page


_PER_PICTURE = (".pcv2", ".png", "_compare.png")
_PER_REPORT = ("report.json", "report.md", "gallery.jpg")


def write_round_trip(trip: RoundTrip, folder: Path, stem: str) -> None:
    """Write STEM.pcv2, STEM.png (restored) and STEM_compare.png (original | restored)."""
    file, restored, compare = (folder / (stem + ending) for ending in _PER_PICTURE)
    write_bytes(file, trip.file)
    write_image(trip.restored, restored)
    write_image(side_by_side([trip.original, trip.restored]), compare)


def plan_outputs(paths: Sequence[Path], out: Path, reports: Sequence[str] = ()) -> list[str]:
    """Return the pictures' names without folder and ending, for their results in ``out``.

    Args:
        paths: picture files.
        out: an existing folder.
        reports: names of further files to write there.

    Raises:
        ValueError: two pictures share a name, or a result would overwrite a picture or another
            result.
    """
    stems = [path.stem for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        if stems.count(stem) > 1:
            raise ValueError(f"{path}: another picture is named {stem!r} too; rename one of them")
    names = [*reports, *(stem + ending for stem in stems for ending in _PER_PICTURE)]
    check_outputs([out / name for name in names], paths)
    return stems


def pictures_in(folder: Path) -> list[Path]:
    """Return the picture files of a folder by name; raise ValueError if there is none."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_ENDINGS)
    if not found:
        raise ValueError(f"no picture in {folder}; the endings are {', '.join(PICTURE_ENDINGS)}")
    return found


def plan_evaluation(
    folder: Path, out: Path, baselines: Sequence[str] = ()
) -> tuple[list[Path], list[str]]:
    """Return the pictures of a folder and their names in ``out``; make ``out`` if missing.

    Raises:
        ValueError: no picture, an unknown baseline, or a result would overwrite a file.
        OSError: a folder cannot be read or made.
    """
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise ValueError(f"unknown baselines {unknown}; choose from {', '.join(BASELINES)}")
    paths = pictures_in(folder)
    out.mkdir(parents=True, exist_ok=True)
    return paths, plan_outputs(paths, out, _PER_REPORT)


def evaluate(
    codec: Codec,
    folder: Path,
    out: Path,
    setting: Setting,
    baselines: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Compress, restore and measure all pictures of a folder, and write a report to ``out``.

    The files are report.json, report.md and, per picture, STEM.pcv2, STEM.png and STEM_compare.png
    (original | restored | baselines). With baselines, gallery.jpg shows all pictures at half size:
    original | restored | the baseline that is best by LPIPS-VGG.

    Args:
        baselines: names from ``baselines.BASELINES``, each given as many bytes as percov2 used.
            Each metric takes the scale that is best by it, and the bytes of the largest file. The
            picture shown is the best by LPIPS-VGG, or by PSNR if that is missing.

    Returns:
        The contents of report.json: setting, images, means, notes and baselines. The "wins" of a
        baseline count the pictures on which percov2 is better, by metric.

    Raises:
        ValueError: as in ``plan_evaluation``, or a picture cannot be decoded.
        OSError: a file cannot be read or written.
    """
    paths, stems = plan_evaluation(folder, out, baselines)
    warm_up(codec, setting)
    records: list[dict[str, Any]] = []
    rivals: dict[str, list[dict[str, Any]]] = {name: [] for name in baselines}
    gallery: list[list[Cell]] = []
    notes: list[str] = []
    for path, stem in zip(tqdm(paths, disable=not progress), stems, strict=True):
        try:
            trip = round_trip(codec, path, setting, METRICS)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        write_round_trip(trip, out, stem)
        records.append({**trip.record, "image": path.name})
        notes += trip.notes
        row = [trip.original, trip.restored]
        shown: dict[str, tuple[float, Attempt]] = {}
        for name in baselines:
            attempts = attempts_within(name, trip.original, len(trip.file))
            if not attempts:
                notes.append(f"{name} has no file of {len(trip.file)} bytes for {path.name}")
                continue
            best = best_of(trip.measured, attempts)
            values = {metric: best[metric][0] if metric in best else None for metric in METRICS}
            size = max(attempt.size for _, attempt in best.values())
            rivals[name].append({"image": path.name, "bytes": size, **values})
            shown[name] = best.get("lpips_vgg") or (-best["psnr"][0], best["psnr"][1])
            row.append(shown[name][1].restored)
        if shown:
            write_image(side_by_side(row), out / f"{stem}_compare.png")
            gallery.append(_gallery_row(stem, trip, shown))
    report = {
        "percov2": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **described(codec, setting),
        "mean": means(records),
        "images": records,
        "baselines": {
            name: {"mean": means(rows), "wins": wins(records, rows), "images": rows}
            for name, rows in rivals.items()
        },
        "notes": sorted(set(notes)),
    }
    write_bytes(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_bytes(out / "report.md", markdown(report, stems).encode(errors="backslashreplace"))
    if gallery:
        write_page(gallery, out / "gallery.jpg")
    return report


def _gallery_row(stem: str, trip: RoundTrip, shown: dict[str, tuple[float, Attempt]]) -> list[Cell]:
    """Return the original, the restored picture and the rival with the lowest value."""
    name = min(shown, key=lambda codec: shown[codec][0])
    rival = shown[name][1]
    return [
        (stem, half_size(trip.original)),
        (f"percov2, {len(trip.file):,} bytes", half_size(trip.restored)),
        (f"{name}, {rival.size:,} bytes", half_size(rival.restored)),
    ]


def means(records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean of every numeric column, or None if a value is missing."""
    columns = [key for key in (records[0] if records else {}) if key != "image"]
    result: dict[str, float | None] = {}
    for key in columns:
        values = [record[key] for record in records]
        result[key] = None if None in values else float(np.mean(values))
    return result


def wins(
    records: Sequence[dict[str, Any]], rivals: Sequence[dict[str, Any]]
) -> dict[str, int | None]:
    """Count, by metric, the pictures on which a record is better than its rival.

    A picture without a rival counts. The count is None if a value is missing.
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


_FORMATS = {
    "bytes": "{:.0f}",
    "bpp": "{:.4f}",
    "psnr": "{:.2f}",
    "ms_ssim": "{:.4f}",
    "lpips_alex": "{:.3f}",
    "lpips_vgg": "{:.3f}",
    "dists": "{:.3f}",
    "encode_s": "{:.2f}",
    "decode_s": "{:.2f}",
}


def table(rows: Sequence[dict[str, Any]], first: str) -> str:
    """Return records as a Markdown table, with dashes for missing values."""
    columns = [key for key in _FORMATS if any(key in row for row in rows)]
    lines = ["| " + " | ".join([first, *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = ["–" if row.get(key) is None else _FORMATS[key].format(row[key]) for key in columns]
        lines.append("| " + " | ".join([str(row["image"]), *cells]) + " |")
    return "\n".join(lines)


def sentence(record: dict[str, Any]) -> str:
    """Return the record of a round trip as one line."""

    def shown(name: str, form: str) -> str:
        return "–" if record[name] is None else form.format(record[name])

    return (
        f"{record['image']}: {record['bytes']} bytes, {record['bpp']:.4f} bpp, "
        f"PSNR {shown('psnr', '{:.2f} dB')}, MS-SSIM {shown('ms_ssim', '{:.4f}')}, "
        f"LPIPS {shown('lpips_alex', '{:.3f}')}, "
        f"encode {record['encode_s']:.2f} s, decode {record['decode_s']:.2f} s"
    )


def _wins_table(report: dict[str, Any]) -> str:
    """Return a table of wins by codec and metric."""
    lines = ["| percov2 is better than | " + " | ".join(METRICS) + " |", "|---" * 6 + "|"]
    for name, entry in report["baselines"].items():
        cells = ["–" if entry["wins"][m] is None else str(entry["wins"][m]) for m in METRICS]
        lines.append(f"| {name}, on … of {len(report['images'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _held(report: dict[str, Any]) -> str:
    if report["target_bytes"]:
        return f"stages for {report['target_bytes']} bytes"
    return f"{report['stages'] or 'all'} stages sent"


def markdown(report: dict[str, Any], stems: Sequence[str]) -> str:
    """Return the report as a page with tables and pictures."""
    images = [*report["images"], {"image": "**mean**", **report["mean"]}]
    parts = [
        f"# {report['model']} {report['rate']}, {len(stems)} pictures",
        f"percov2 {report['percov2']}, model id {report['model_id']}, schedule "
        f"{report['schedule']}, {report['steps']} steps, guidance {report['guidance']}, seed "
        f"{report['seed']}, effort {report['effort']}, slack {report['slack']}, {_held(report)}; "
        f"torch {report['torch']}, {report['threads']} threads. bpp counts the whole file.",
        table(images, "image"),
    ]
    rivals = [
        {"image": name, **entry["mean"]}
        for name, entry in report["baselines"].items()
        if entry["images"]
    ]
    if rivals:
        own = {key: report["mean"][key] for key in ("bytes", *METRICS)}
        parts += [
            "## At the same number of bytes",
            table([{"image": f"percov2 {report['rate']}", **own}, *rivals], "codec"),
            "For a classical codec, each metric takes the scale that is best by it.",
            _wins_table(report),
        ]
    if report["notes"]:
        parts.append("\n".join(f"- {note}" for note in report["notes"]))
    order = " | ".join(["original", "percov2", *report["baselines"]])
    parts += ["## Pictures", order]
    if rivals:
        parts.append("[All at half size](gallery.jpg), beside the best classical codec.")
    parts += [f"### {stem}\n\n![{stem}]({stem}_compare.png)" for stem in stems]
    return "\n\n".join(parts) + "\n"
