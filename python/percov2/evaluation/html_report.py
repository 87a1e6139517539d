"""A report as one HTML file, from JSON files of ``percov2 eval``, that requests nothing else.

The page holds sortable tables, curves and, for every picture, all systems side by side under a
slider. Tables and pictures can be read without JavaScript.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from percov2.evaluation.figures import label_of, measured_points, rates_svg
from percov2.evaluation.metrics import METRICS
from percov2.evaluation.published import PUBLISHED_METRICS, published
from percov2.evaluation.report import pictures_of, systems_of
from percov2.evaluation.report_page import FORMS
from percov2.evaluation.writers import cell
from percov2.files import write_bytes
from percov2.stored_files import read_json

__all__ = ["html_page", "write_html"]

_QUALITY = 90
"""WebP quality of the pictures in the page."""
_RIGHT = ' class="n"'
_KINDS = {"codec": "at most as many bytes", "command": "own bytes", "folder": "own bytes"}
Cell = str | tuple[str, float]
"""A text, or a number as text with its value for sorting."""


def write_html(paths: Sequence[Path], out: Path, dataset: str | None = None) -> None:
    """Write the page of ``html_page`` to ``out``."""
    write_bytes(out, html_page(paths, dataset).encode(errors="xmlcharrefreplace"))


def html_page(paths: Sequence[Path], dataset: str | None = None) -> str:
    """Return a page about report.json and realism.json files.

    The folders of report.json files hold the pictures. ``dataset`` names a data set whose published
    points are added to the curves and, in a table of their own, to the page.

    Raises ValueError if a file is no report or the data set is unknown, and the errors of
    ``report.pictures_of``.
    """
    points, notes = measured_points(paths)  # also checks the files
    records = [(path.parent, read_json(path)) for path in paths]
    reports = [(folder, record) for folder, record in records if "images" in record]
    judged = [record for _, record in records if "measures" in record]
    others = [] if dataset is None else published(dataset)
    first = records[0][1]
    title = f"percov2 {first['model']}: {len(records)} evaluation{'s' * (len(records) > 1)}"
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f"<p>{escape(_setting(record))}</p>" for _, record in records]
    if reports:
        parts += ["<h2>Means</h2>", _means(reports)]
    if judged:
        parts += ["<h2>Realism</h2>", _realism(judged)]
    parts += ["<h2>Curves</h2>", f'<div class="wide">{rates_svg(points, others, notes)}</div>']
    if others:
        parts += [f"<h2>Published for {escape(str(dataset))}, not measured here</h2>"]
        parts.append(_published(dataset))
    every = [note for _, record in records for note in record.get("notes", [])]
    if every:
        items = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(every))
        parts += ["<h2>Notes</h2>", f"<ul>{items}</ul>"]
    if reports:
        parts += ["<h2>Pictures</h2>", f"<p>{_HOW}</p>", *_pictures(reports)]
        parts += ["<h2>Every picture</h2>", _every(reports)]
    body = "\n".join(parts)
    return _PAGE.format(title=escape(title), style=_STYLE, script=_SCRIPT, body=body)


def _setting(record: dict[str, Any]) -> str:
    names = ("runtime", "model_id", "schedule", "steps", "guidance", "realism", "seed", "effort")
    shown = [f"{name} {record[name]}" for name in names if record.get(name) is not None]
    count = f"{len(record['images'])} pictures" if "images" in record else "held-out crops"
    return f"{record['model']} {record['rate']}, {count}; " + ", ".join(shown) + "."


def _number(form: str, value: float | None) -> Cell:
    return cell(form, value) if value is None else (cell(form, value), value)


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table whose numbers carry their value, by which a script can sort."""
    lines = []
    for row in rows:
        cells = "".join(
            f"<td{_RIGHT * (one == '–')}>{escape(one)}</td>"
            if isinstance(one, str)
            else f'<td class="n" data-v="{one[1]!r}">{escape(one[0])}</td>'
            for one in row
        )
        lines.append(f"<tr>{cells}</tr>")
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table><thead><tr>{names}</tr></thead>\n<tbody>{body}</tbody></table>'
        "</div>"
    )


def _cells(record: dict[str, Any], keys: Sequence[str]) -> list[Cell]:
    return [_number(FORMS[key], record.get(key)) for key in keys]


def _keys(records: Iterable[dict[str, Any]]) -> list[str]:
    known = {key for record in records for key in record}
    return [key for key in FORMS if key in known]


def _means(reports: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    entries: list[tuple[str, str, int, dict[str, Any]]] = []
    for _, report in reports:
        name, count = f"percov2 {report['rate']}", len(report["images"])
        entries.append((name, "percov2", count, report["mean"]))
        for name, entry in report["baselines"].items():
            kind = f"{_KINDS[entry['kind']]} ({report['rate']})"
            entries.append((name, kind, len(entry["images"]), entry["mean"]))
    keys = _keys(mean for *_, mean in entries)
    rows = (
        [name, kind, (str(count), count), *_cells(mean, keys)]
        for name, kind, count, mean in entries
    )
    text = "<p>A classical codec may use at most as many bytes as percov2 at the rate in brackets. "
    text += "For each metric, it takes the scale that is best by that metric.</p>"
    return text + _table(["system", "compared", "pictures", *keys], rows)


def _every(reports: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    rows = [
        (record["image"], name, report["rate"], record)
        for _, report in reports
        for image in report["images"]
        for name, record in systems_of(report, image["image"])
    ]
    keys = _keys(record for *_, record in rows)
    head = ["picture", "system", "compared at", *keys]
    return _table(head, ([*names, *_cells(record, keys)] for *names, record in rows))


def _realism(judged: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for record in judged for name in record["measures"]))
    rows: list[list[Cell]] = []
    for record in judged:
        row: list[Cell] = [f"{record['model']} {record['rate']}", str(record["photos"])]
        for name in names:
            found = record["measures"].get(name)
            if found is None:
                row.append("–")
            else:
                low, high = found["interval"]
                text = f"{found['value']:.5g} [{low:.5g}, {high:.5g}]"
                row.append((text, found["value"]))
        rows.append(row)
    return "<p>Brackets are 95 % intervals over photos.</p>" + _table(
        ["model", "photos", *names], rows
    )


def _published(dataset: str | None) -> str:
    rows: list[list[Cell]] = []
    for point in published(dataset, coded=False):
        row: list[Cell] = [point.system, point.point, _number("{:.4f}", point.bpp)]
        row += [_number("{:g}", point.values.get(name)) for name in PUBLISHED_METRICS]
        rows.append([*row, point.source])
    return _table(["system", "point", "bpp", *PUBLISHED_METRICS, "source"], rows)


def _pictures(reports: Sequence[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Return a section per picture; reports over the same picture share one."""
    sections: dict[tuple[str, str], list[str]] = {}
    for folder, report in reports:
        for image in (record["image"] for record in report["images"]):
            cells = pictures_of(report, folder, image)
            original = cells[0][1]
            key = image, hashlib.sha256(np.asarray(original).tobytes()).hexdigest()
            if key not in sections:
                size = f"{original.width}×{original.height}"
                sections[key] = [_figure("original", f"original, {size}", original)]
            records = systems_of(report, image)
            for (name, record), (_, picture) in zip(records, cells[1:], strict=True):
                size = record.get("shown_bytes", record["bytes"])
                bpp = 8 * size / (picture.width * picture.height)
                caption = f"{name}, {size:,} bytes, {bpp:.4f} bpp"
                values = [
                    f"{label_of(m).split(' (')[0]} {cell(FORMS[m], record[m])}"
                    for m in METRICS
                    if record.get(m) is not None and size == record["bytes"]
                ]
                caption += f"; {', '.join(values)}" if values else ""
                sections[key].append(_figure(name, caption, picture))
    return [
        f'<section><h3>{escape(image)}</h3>\n<div class="row">{"".join(figures)}</div></section>'
        for (image, _), figures in sections.items()
    ]


def _figure(name: str, caption: str, picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=_QUALITY)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(name)}" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/webp;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>\n'
    )


_HOW = (
    f"Pictures are stored here as WebP at quality {_QUALITY}. With JavaScript, choose two of them, "
    "move the slider between them, zoom with the buttons, and drag to move the picture."
)
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
.wide svg { max-width: 100%; height: auto; background: white; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8886; padding: .2rem .6rem; text-align: left; }
td.n { text-align: right; white-space: nowrap; }
th button { font: inherit; font-weight: bold; border: 0; background: none; color: inherit;
  padding: 0; cursor: pointer; text-align: left; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; max-width: 24rem; }
figure img { max-width: 100%; height: auto; }
.view { position: relative; overflow: hidden; width: 100%; max-width: 60rem; cursor: grab;
  touch-action: none; }
.view img { position: absolute; inset: 0; width: 100%; height: 100%; transform-origin: 0 0;
  user-select: none; }
.view .top { position: absolute; inset: 0; overflow: hidden; }
.view .edge { position: absolute; top: 0; bottom: 0; width: 2px; background: #fff;
  outline: 1px solid #000; pointer-events: none; }
.tools { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin: .4rem 0; }
.tools input { flex: 1; min-width: 10rem; max-width: 40rem; }
"""
_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => {
        const one = row.cells[i];
        return one.dataset.v === undefined ? one.textContent : Number(one.dataset.v);
      };
      const missing = v => v === "–";
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (missing(x) || missing(y)) return missing(x) - missing(y);
        const both = typeof x === "number" && typeof y === "number";
        const order = both ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    };
  });
}
for (const section of document.querySelectorAll("section")) {
  const images = [...section.querySelectorAll("figure img")];
  const view = document.createElement("div");
  view.className = "view";
  view.style.aspectRatio = images[0].width + " / " + images[0].height;
  const below = new Image(), above = new Image();
  const top = document.createElement("div"), edge = document.createElement("div");
  top.className = "top";
  edge.className = "edge";
  below.draggable = above.draggable = false;
  top.append(above);
  view.append(below, top, edge);
  const choose = (label, image, first) => {
    const select = document.createElement("select");
    select.setAttribute("aria-label", label);
    images.forEach((one, i) => {
      const option = new Option(one.nextElementSibling.textContent.split(";")[0], i);
      select.add(option);
    });
    select.selectedIndex = first;
    const show = () => {
      image.src = images[select.value].src;
      image.alt = images[select.value].alt;
    };
    select.onchange = show;
    show();
    return select;
  };
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: 0, max: 100, value: 50 });
  slider.setAttribute("aria-label", "edge between the two pictures, percent");
  let zoom = 1, x = 0, y = 0;
  const draw = () => {
    const box = view.getBoundingClientRect();
    x = Math.min(0, Math.max(x, box.width * (1 - zoom)));
    y = Math.min(0, Math.max(y, box.height * (1 - zoom)));
    below.style.transform = above.style.transform =
      "translate(" + x + "px," + y + "px) scale(" + zoom + ")";
    below.style.imageRendering = above.style.imageRendering = zoom > 3 ? "pixelated" : "auto";
    top.style.clipPath = "inset(0 " + (100 - slider.value) + "% 0 0)";
    edge.style.left = slider.value + "%";
  };
  slider.oninput = draw;
  const button = (text, label, change) => {
    const one = document.createElement("button");
    one.type = "button";
    one.textContent = text;
    one.setAttribute("aria-label", label);
    one.onclick = () => {
      const before = zoom, box = view.getBoundingClientRect();
      zoom = Math.min(16, Math.max(1, change(zoom)));
      x = box.width / 2 - (box.width / 2 - x) * zoom / before;
      y = box.height / 2 - (box.height / 2 - y) * zoom / before;
      draw();
    };
    return one;
  };
  let from = null;
  view.onpointerdown = event => {
    from = [event.clientX - x, event.clientY - y];
    view.setPointerCapture(event.pointerId);
  };
  view.onpointermove = event => {
    if (from === null) return;
    [x, y] = [event.clientX - from[0], event.clientY - from[1]];
    draw();
  };
  view.onpointerup = view.onpointercancel = () => { from = null; };
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.append(choose("left picture", above, 0), slider,
    choose("right picture", below, Math.min(1, images.length - 1)),
    button("+", "zoom in", z => z * 2), button("−", "zoom out", z => z / 2));
  section.insertBefore(tools, section.lastElementChild);
  section.insertBefore(view, section.lastElementChild);
  addEventListener("resize", draw);
  draw();
}
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
