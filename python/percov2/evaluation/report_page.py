"""The Markdown page of an evaluation on photos, at one rate or at several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from percov2.evaluation.metrics import METRICS
from percov2.evaluation.writers import cell, markdown_table

__all__ = ["FORMS", "LABELS", "markdown", "names_of", "table"]

LABELS = {
    "bytes": "bytes",
    "bpp": "bpp",
    "psnr": "PSNR, dB",
    "ms_ssim": "MS-SSIM",
    "lpips_alex": "LPIPS (AlexNet)",
    "lpips_vgg": "LPIPS (VGG)",
    "dists": "DISTS",
    "encode_s": "encode, s",
    "decode_s": "decode, s",
    "seconds": "seconds",
}
"""The titles of the columns, in their order."""
_DIGITS = {"bytes": 0, "bpp": 4, "psnr": 2, "ms_ssim": 4, "encode_s": 2, "decode_s": 2}
FORMS = {key: f"{{:,.{_DIGITS.get(key, 3 if key in METRICS else 2)}f}}" for key in LABELS}
"""The formats of the columns."""

Report = dict[str, Any]


def table(rows: Sequence[dict[str, Any]], first: str, left_out: Sequence[str] = ()) -> str:
    """Return records as a Markdown table, with dashes for missing values.

    The first column, ``first``, is the item "name" of the records, or "image".
    """
    keys = [key for key in LABELS if key not in left_out and any(key in row for row in rows)]
    cells = (
        [str(row.get("name", row.get("image"))), *(cell(FORMS[key], row.get(key)) for key in keys)]
        for row in rows
    )
    return markdown_table([first, *(LABELS[key] for key in keys)], cells)


def markdown(
    reports: Sequence[Report],
    pictures: Sequence[tuple[str, str]] = (),
    command: str = "",
    curves: str = "",
) -> str:
    """Return the page of an evaluation.

    Args:
        reports: the report of each rate (``report.evaluate``), over the same photos.
        pictures: the titles and files of pictures.
        command: the command that made the page, or "".
        curves: the file of the figure of all measures over bits per pixel, or "".
    """
    first = reports[0]
    photos = names_of([record["image"] for record in first["images"]])
    rates = ", ".join(report["rate"] for report in reports)
    parts = [f"# {first['model']} {rates}: {photos}", _setting(reports, photos)]
    if command:
        parts.append(f"```sh\n{command}\n```")
    means = [{**report["mean"], "name": f"`{report['rate']}`"} for report in reports]
    parts += ["## Means", table(means, "rate", ("encode_s", "decode_s"))]
    if curves:
        parts.append(f"![each measure over bits per pixel]({curves})")
    for report in reports:
        parts += _rate(report)
    parts += _rivals(reports)
    notes = list(dict.fromkeys(_notes(reports)))
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    if pictures:
        parts += ["## Pictures", *(f"{title}:\n\n![{title}]({file})" for title, file in pictures)]
    return "\n\n".join(parts) + "\n"


def names_of(images: Sequence[str]) -> str:
    """Return the names of photos as a range, or their number if they are not a range.

    >>> names_of(["kodim01.png", "kodim02.png", "kodim03.png"])
    'kodim01–03'
    >>> names_of(["cat.png", "dog.png"])
    '2 photos'
    """
    found = [re.fullmatch(r"(.*?)(\d+)", PurePath(image).stem) for image in images]
    parts = [match.groups() for match in found if match]
    if len(parts) == len(images) > 1 and len({name for name, _ in parts}) == 1:
        numbers = [int(number) for _, number in parts]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return f"{parts[0][0]}{parts[0][1]}–{parts[-1][1]}"
    return f"{len(images)} photo{'s' * (len(images) > 1)}"


_USUAL = {"realism": 1.0, "effort": 0, "slack": 0.0, "captioner": "NoCaptioner"}
_USUAL |= {"stages": None, "target_bytes": None}
"""Settings that the page names only if they have other values."""


def _setting(reports: Sequence[Report], photos: str) -> str:
    first = reports[0]
    names = ["schedule", "guidance", "seed"]
    for name, usual in _USUAL.items():
        if any(report.get(name, usual) != usual for report in reports):
            names.append(name)
    values = {name: dict.fromkeys(str(report.get(name)) for report in reports) for name in names}
    settings = [f"{name} {'/'.join(found)}" for name, found in values.items()]
    software = {"percov2": first["percov2"], **first["software"]}
    versions = ", ".join(f"{name} {version}" for name, version in software.items())
    lines = [
        f"Photos: {photos}. bpp counts all bytes of a file.",
        f"Settings: {', '.join(settings)}.",
        f"Software: {versions}.",
        f"Machine: {'; '.join(filter(None, (first['processor'], first['runtime'])))}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _rate(report: Report) -> list[str]:
    """Return the section of a rate: its photos, and classical codecs at equal bytes."""
    steps = f"{report['steps']} step{'s' * (report['steps'] != 1)}"
    images = [*report["images"], {**report["mean"], "name": "**mean**"}]
    parts = [
        f"## `{report['rate']}`, model id {report['model_id']}, {steps}",
        table(images, "image"),
    ]
    codecs = _others(report, classical=True)
    if any(entry["images"] for entry in codecs.values()):
        rows = [{**entry["mean"], "name": name} for name, entry in codecs.items()]
        counts = (
            [f"{name}, on … of {len(report['images'])}"]
            + [cell("{}", entry["wins"][metric]) for metric in METRICS]
            for name, entry in codecs.items()
        )
        head = ["percov2 is better than", *(LABELS[metric] for metric in METRICS)]
        parts += [_EQUAL, table([_own(report), *rows], "codec", ("bpp",)), _WINS]
        parts.append(markdown_table(head, counts))
    return parts


_EQUAL = (
    "For each photo, a classical codec may use at most as many bytes as percov2. The table gives "
    "means over\nthe photos for which the codec has such a file:"
)
_WINS = (
    "Before encoding, a classical codec may reduce the size of the photo. Each value is the best "
    "over all\nscales for that metric, so no single file reaches all of these values. The next "
    "table counts the\nphotos on which percov2 is better. It includes photos for which the codec "
    "has no such file."
)


def _rivals(reports: Sequence[Report]) -> list[str]:
    """Return the section of other systems, which are the same at every rate."""
    entries = _others(reports[0], classical=False)
    if not entries:
        return []
    rows = [*map(_own, reports), *({**e["mean"], "name": name} for name, e in entries.items())]
    sources = [f"- {name}: {e['kind']} `` {e['source']} ``" for name, e in entries.items()]
    title = "## Other systems, each at its own number of bytes"
    return [title, table(rows, "codec"), "\n".join(sources)]


def _others(report: Report, classical: bool) -> dict[str, Any]:
    entries = report["baselines"].items()
    return {name: entry for name, entry in entries if (entry["kind"] == "codec") == classical}


def _own(report: Report) -> dict[str, Any]:
    """Return the row of percov2 in a table of codecs."""
    mean = {key: report["mean"][key] for key in ("bytes", "bpp", *METRICS)}
    return {**mean, "name": f"percov2 {report['rate']}"}


def _notes(reports: Sequence[Report]) -> list[str]:
    """Return the notes on all rates; a note that is not on every rate names its rate."""
    return [
        note if all(note in other["notes"] for other in reports) else f"{report['rate']}: {note}"
        for report in reports
        for note in report["notes"]
    ]
