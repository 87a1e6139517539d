"""The evaluation of a model at several rates: a page, a JSON file, figures and the HTML page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from percov2.codec import Codec
from percov2.evaluation.figures import rates_figure
from percov2.evaluation.gallery import Cell, reduced, write_page
from percov2.evaluation.html_report import write_html
from percov2.evaluation.published import published
from percov2.evaluation.report import GALLERY, evaluate, facts_of, pictures_of, plan_evaluation
from percov2.evaluation.report_page import markdown
from percov2.evaluation.rivals import Rival
from percov2.evaluation.setting import Setting, change
from percov2.evaluation.writers import write_json
from percov2.files import check_outputs, write_bytes
from percov2.stored_files import read_json

__all__ = ["KEPT", "evaluate_rates", "plan_rates", "rates_page"]

KEPT = "compared"
"""The folder of the results of other codecs, in the folder of an evaluation."""
_CURVES, _RATES, _CLASSICAL = "curves.png", "rates.jpg", "classical.jpg"
_OWN = ("report.json", "report.md", "report.html", _CURVES, _RATES, _CLASSICAL)
_SHOWN = 24
"""The largest number of photos in rates.jpg."""


def plan_rates(
    folder: Path,
    out: Path,
    rates: Sequence[str],
    baselines: Sequence[str] = (),
    rivals: Sequence[Rival] = (),
    dataset: str | None = None,
) -> list[Path]:
    """Return the photos of a folder. Raise the errors of ``evaluate_rates`` that can be foreseen.

    The function makes ``out`` and its folder of every rate if they are missing.
    """
    if len(set(rates)) < len(rates):
        raise ValueError(f"a rate is named twice in {','.join(rates)}")
    if dataset is not None:
        published(dataset)
    paths: list[Path] = []
    for rate in rates:
        paths, _ = plan_evaluation(folder, out / rate, baselines, rivals)
    check_outputs([out / name for name in _OWN], paths)
    return paths


def evaluate_rates(
    codec: Codec,
    folder: Path,
    out: Path,
    setting: Setting | None = None,
    rates: Sequence[str] = (),
    baselines: Sequence[str] = (),
    rivals: Sequence[Rival] = (),
    *,
    kept: Path | None = None,
    dataset: str | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model at several rates, and write one report about them to ``out``.

    The folder OUT/RATE gets what ``report.evaluate`` writes. A rate is not evaluated again if its
    report.json has the same model, settings, photos, software and codecs. ``out`` gets report.md,
    report.json, report.html, curves.png (all measures over bits per pixel), rates.jpg (the first 24
    photos at all rates, at a third of their size) and, with baselines, classical.jpg (the gallery
    of the first rate for which a classical codec has a file).

    Args:
        codec: the codec to evaluate.
        folder: the photos.
        out: folder for the results.
        setting: options of the codec, apart from the rate; None for the defaults.
        rates: names of rates; all rates of the model if empty.
        baselines: classical codecs to compare at equal bytes; see ``report.evaluate``.
        rivals: other systems to compare at their own bytes.
        kept: folder of results of baselines and rivals, which several models may share; None for
            OUT/compared.
        dataset: data set whose published points are added to curves and page, or None.
        command: the command to state in the report.
        say: function that is given a line for every rate that is kept or evaluated again.
        progress: True to show the progress.

    Returns:
        The contents of report.json: model, command, and "rates", the report of each rate.

    Raises:
        ValueError: a rate is unknown or named twice; and the errors of ``report.evaluate``.
    """
    setting = setting or Setting()
    names = [
        codec.config.rate(name).name for name in rates or [rate.name for rate in codec.config.rates]
    ]
    paths = plan_rates(folder, out, names, baselines, rivals, dataset)
    reports = {}
    for name in names:
        own = replace(setting, encode=replace(setting.encode, rate=name))
        path = out / name / "report.json"
        facts = facts_of(codec, paths, own, baselines, rivals)
        found, reason = _finished(path, facts)
        if found is None:
            if reason:
                say(f"{name} is evaluated again: {reason}")
            path.unlink(missing_ok=True)  # until it is complete, the folder holds no run
            store = kept or out / KEPT
            found = evaluate(codec, folder, path.parent, own, baselines, progress, rivals, store)
        else:
            say(f"{name} is finished; its results in {path.parent} are kept")
        reports[name] = found
    return _write(out, reports, dataset, command)


def _finished(path: Path, facts: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Return the report of a finished run with these facts, or None and what differs, if any."""
    if not path.is_file():
        return None, ""
    found = read_json(path)
    if not isinstance(found, dict):
        return None, f"{path} is no report"
    for key, value in facts.items():
        if key not in found or found[key] != value:
            return None, f"{key} {change(found.get(key), value)}"
    return found, ""


def _write(
    out: Path, reports: dict[str, dict[str, Any]], dataset: str | None, command: str
) -> dict[str, Any]:
    """Write the files about all rates, report.json last, and return its content."""
    folders = {name: out / name for name in reports}
    files = [folder / "report.json" for folder in folders.values()]
    rates_figure(files, out / _CURVES, dataset=dataset)
    write_html(files, out / "report.html", dataset)
    _write_pictures(out / _RATES, reports, folders)
    if (name := _compared(reports)) is not None:
        shutil.copyfile(folders[name] / "gallery.jpg", out / _CLASSICAL)
    first = next(iter(reports.values()))
    result = {"model": first["model"], "percov2": first["percov2"], "command": command}
    result |= {"published": dataset, "rates": reports}
    write_bytes(out / "report.md", rates_page(result).encode(errors="backslashreplace"))
    write_json(out / "report.json", result)
    return result


def rates_page(result: dict[str, Any]) -> str:
    """Return the Markdown page of a result of ``evaluate_rates``."""
    reports = result["rates"]
    pictures = [("The original and all rates, at a third of their size", _RATES)]
    if (name := _compared(reports)) is not None:
        pictures.insert(0, (GALLERY.replace("percov2", name), _CLASSICAL))
    return markdown(list(reports.values()), pictures, result["command"], _CURVES)


def _compared(reports: dict[str, dict[str, Any]]) -> str | None:
    """Return the first rate for which a classical codec has a file, or None."""
    for name, report in reports.items():
        entries = report["baselines"].values()
        if any(entry["kind"] == "codec" and entry["images"] for entry in entries):
            return name
    return None


def _write_pictures(
    path: Path, reports: dict[str, dict[str, Any]], folders: dict[str, Path]
) -> None:
    """Write rows of pictures: the original and percov2's copy at every rate."""
    first = next(iter(reports.values()))
    rows = []
    for i, record in enumerate(first["images"][:_SHOWN]):
        row: list[Cell] = []
        for name, report in reports.items():
            cells = pictures_of(report, folders[name], record["image"])
            if not row:
                row.append((Path(record["image"]).stem, reduced(cells[0][1], 3)))
            size = report["images"][i]["bytes"]
            row.append((f"{name}, {size:,} bytes", reduced(cells[1][1], 3)))
        rows.append(row)
    write_page(rows, path)
