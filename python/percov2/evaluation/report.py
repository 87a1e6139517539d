"""Round trips of pictures, and reports with measures and side-by-side pictures."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from percov2 import __version__
from percov2.codec import Codec
from percov2.evaluation.baselines import BASELINES, Attempt, attempts_within, best_of
from percov2.evaluation.gallery import Cell, half_size, write_page
from percov2.evaluation.metrics import HIGHER_IS_BETTER, METRICS, Original, measure
from percov2.evaluation.rivals import Rival, check_names
from percov2.evaluation.setting import Setting, compress, described, restore
from percov2.evaluation.writers import cell, markdown_table, write_json
from percov2.files import SUFFIX, check_kind, check_outputs, write_bytes, write_image
from percov2.images import read_image, to_rgb
from percov2.options import EncodeOptions

__all__ = [
    "RoundTrip",
    "evaluate",
    "markdown",
    "means",
    "missing",
    "pictures_in",
    "pictures_of",
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


def evaluate(
    codec: Codec,
    folder: Path,
    out: Path,
    setting: Setting,
    baselines: Sequence[str] = (),
    progress: bool = True,
    rivals: Sequence[Rival] = (),
) -> dict[str, Any]:
    """Compress, restore and measure all pictures of a folder, and write a report to ``out``.

    The files are report.json, report.md and, per picture, STEM.pcv2, STEM.png and STEM_compare.png
    (original | restored | baselines | rivals). With baselines, gallery.jpg shows all pictures at
    half size: original | restored | the baseline that is best by LPIPS-VGG.

    Each of ``baselines`` (names from ``BASELINES``) may use as many bytes as percov2 used. For each
    metric, the report shows the baseline at the scale that is best by that metric. A baseline's
    bytes are those of its largest file. The picture shown is the best by LPIPS-VGG, or by PSNR if
    LPIPS-VGG is missing. A baseline that is not installed is left out, and a note says how to
    install it. ``rivals`` are measured at their own number of bytes.

    Returns the contents of report.json: setting, images, means, notes and baselines. "baselines"
    holds baselines and rivals; "kind" tells them apart ("codec", "command" or "folder"), and the
    operating points of one "system" form a curve. The "wins" are the number of pictures on which
    percov2 is better, by metric. Raises the errors of
    ``plan_evaluation``, ``round_trip`` and ``Rival.restore``.
    """
    paths, stems = plan_evaluation(folder, out, baselines, rivals)
    notes = missing(baselines)
    baselines = [name for name in baselines if BASELINES[name].available()]
    warm_up(codec, setting)
    records: list[dict[str, Any]] = []
    others: dict[str, list[dict[str, Any]]] = {name: [] for name in baselines}
    others |= {rival.name: [] for rival in rivals}
    gallery: list[list[Cell]] = []
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
            record, value, attempt = _compared(trip, path, attempts)
            others[name].append(record)
            shown[name] = value, attempt
            row.append(attempt.restored)
        if shown:
            name = min(shown, key=lambda codec: shown[codec][0])
            best = shown[name][1]
            cells = [
                (stem, trip.original),
                (f"percov2, {len(trip.file):,} bytes", trip.restored),
                (f"{name}, {best.size:,} bytes", best.restored),
            ]
            gallery.append([(label, half_size(picture)) for label, picture in cells])
        for rival in rivals:
            attempt, seconds = rival.restore(trip.original, path)
            record, _, _ = _compared(trip, path, [attempt])
            others[rival.name].append(record if seconds is None else {**record, "seconds": seconds})
            row.append(attempt.restored)
        if len(row) > 2:
            write_image(side_by_side(row), out / f"{stem}_compare.png")
    kinds = {name: {"kind": "codec", "system": name} for name in baselines}
    kinds |= {
        rival.name: {"kind": rival.kind, "system": rival.system, "source": rival.source}
        for rival in rivals
    }
    report = {
        "percov2": __version__,
        **described(codec, setting),
        "mean": means(records),
        "images": records,
        "baselines": {
            name: {**kinds[name], "mean": means(rows), "wins": wins(records, rows), "images": rows}
            for name, rows in others.items()
        },
        "notes": sorted(set(notes)),
    }
    write_json(out / "report.json", report)
    write_bytes(out / "report.md", markdown(report, stems).encode(errors="backslashreplace"))
    if gallery:
        write_page(gallery, out / "gallery.jpg")
    return report


def missing(baselines: Sequence[str]) -> list[str]:
    """Return a note for each baseline that is not installed, with the command that installs it."""
    return [
        f"{name} was not measured: it is not installed ({BASELINES[name].install})"
        for name in baselines
        if not BASELINES[name].available()
    ]


def _compared(
    trip: RoundTrip, path: Path, attempts: list[Attempt]
) -> tuple[dict[str, Any], float, Attempt]:
    """Return the record of attempts at a picture, and the attempt to show after its value.

    The value is LPIPS-VGG, or the negative of PSNR if LPIPS-VGG is missing.
    """
    best = best_of(trip.measured, attempts)
    values = {metric: best[metric][0] if metric in best else None for metric in METRICS}
    size = max((attempt.size for _, attempt in best.values()), default=attempts[0].size)
    value, shown = math.inf, attempts[0]
    if "lpips_vgg" in best:
        value, shown = best["lpips_vgg"]
    elif "psnr" in best:
        value, shown = -best["psnr"][0], best["psnr"][1]
    bpp = 8 * size / (trip.original.width * trip.original.height)
    sizes = {"bytes": size, "bpp": bpp, "shown_bytes": shown.size}
    return {"image": path.name, **sizes, **values}, value, shown


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


_DIGITS = {"bytes": 0, "bpp": 4, "psnr": 2, "ms_ssim": 4, "lpips_alex": 3, "lpips_vgg": 3}
_DIGITS |= {"dists": 3, "encode_s": 2, "decode_s": 2, "seconds": 2}
"""Number of decimals of each column."""


def table(rows: Sequence[dict[str, Any]], first: str) -> str:
    """Return records as a Markdown table, with dashes for missing values."""
    columns = {key: f"{{:.{n}f}}" for key, n in _DIGITS.items() if any(key in row for row in rows)}
    cells = (
        [str(row["image"]), *(cell(form, row.get(key)) for key, form in columns.items())]
        for row in rows
    )
    return markdown_table([first, *columns], cells)


def sentence(record: dict[str, Any]) -> str:
    """Return the record of a round trip as one line."""
    return (
        f"{record['image']}: {record['bytes']} bytes, {record['bpp']:.4f} bpp, "
        f"PSNR {cell('{:.2f} dB', record['psnr'])}, MS-SSIM {cell('{:.4f}', record['ms_ssim'])}, "
        f"LPIPS {cell('{:.3f}', record['lpips_alex'])}, "
        f"encode {record['encode_s']:.2f} s, decode {record['decode_s']:.2f} s"
    )


def markdown(report: dict[str, Any], stems: Sequence[str]) -> str:
    """Return the report as a Markdown page with tables and pictures."""
    images = [*report["images"], {"image": "**mean**", **report["mean"]}]
    held = f"{report['stages'] or 'all'} stages sent"
    if report["target_bytes"]:
        held = f"stages for {report['target_bytes']} bytes"
    parts = [
        f"# {report['model']} {report['rate']}, {len(stems)} pictures",
        f"percov2 {report['percov2']}, model id {report['model_id']}, schedule "
        f"{report['schedule']}, {report['steps']} steps, guidance {report['guidance']}, seed "
        f"{report['seed']}, effort {report['effort']}, slack {report['slack']}, {held}; "
        f"{report['runtime']}. bpp counts the whole file.",
        table(images, "image"),
    ]
    codecs, rivals = (
        {name: e for name, e in report["baselines"].items() if (e["kind"] == "codec") == classical}
        for classical in (True, False)
    )
    own = {key: report["mean"][key] for key in ("bytes", "bpp", *METRICS)}
    own["image"] = f"percov2 {report['rate']}"

    def compared(entries: dict[str, Any]) -> str:
        rows = [{"image": name, **e["mean"]} for name, e in entries.items() if e["images"]]
        return table([own, *rows], "codec")

    if any(entry["images"] for entry in codecs.values()):
        counts = [
            [f"{name}, on … of {len(report['images'])}"]
            + [cell("{}", entry["wins"][metric]) for metric in METRICS]
            for name, entry in codecs.items()
        ]
        parts += [
            "## At the same number of bytes",
            compared(codecs),
            "For a classical codec, each metric takes the scale that is best by it.",
            markdown_table(["percov2 is better than", *METRICS], counts),
        ]
    if rivals:
        sources = [f"- {name}: {e['kind']} `` {e['source']} ``" for name, e in rivals.items()]
        parts += ["## Other systems, each at its own number of bytes", compared(rivals)]
        parts.append("\n".join(sources))
    if report["notes"]:
        parts.append("\n".join(f"- {note}" for note in report["notes"]))
    order = " | ".join(["original", "percov2", *report["baselines"]])
    parts += ["## Pictures", order]
    if any(entry["images"] for entry in codecs.values()):
        parts.append("[All at half size](gallery.jpg), beside the best classical codec.")
    parts += [f"### {stem}\n\n![{stem}]({stem}_compare.png)" for stem in stems]
    return "\n\n".join(parts) + "\n"
