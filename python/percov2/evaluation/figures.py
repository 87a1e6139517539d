"""Figures of evaluations, from JSON files of ``percov2 eval`` only.

Measured points of a system form a line of their own colour, marker and dash. Published points are
grey markers that no line joins, and their sources are listed below the figure.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise, product
from math import cos, pi, sin
from pathlib import Path
from typing import Any

import numpy as np

from percov2.entropy.schedule import SCHEDULES, stages
from percov2.evaluation.published import PUBLISHED_METRICS, PublishedPoint, published, sources
from percov2.evaluation.report import pictures_of, systems_of
from percov2.files import write_bytes
from percov2.stored_files import read_json

__all__ = [
    "METRIC_LABELS",
    "MeasuredPoint",
    "clip_figure",
    "draw_modes",
    "label_of",
    "measured_points",
    "modes_figure",
    "pictures_figure",
    "rates_figure",
    "rates_svg",
    "schedules_figure",
]

METRIC_LABELS = {
    "psnr": "PSNR, dB (higher is better)",
    "ms_ssim": "MS-SSIM (higher is better)",
    "lpips_alex": "LPIPS, AlexNet (lower is better)",
    "lpips_vgg": "LPIPS, VGG (lower is better)",
    "dists": "DISTS (lower is better)",
    "fid": "FID (lower is better)",
    "kid": "KID (lower is better)",
    "frechet": "Fréchet distance (lower is better)",
    "kernel": "kernel distance (lower is better)",
}
"""The axis label of a metric. Any other metric is labelled with its key."""

FONT = 9.5
"""Size of the smallest text, in points."""
# Colours of Okabe and Ito, in an order in which neighbours differ in lightness, too.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vP*X<>"
_DASHES = ("-", "--", "-.", ":")
_HOLLOW = "os^vDPX*<>d+x1"
_GREY = "0.45"
_STYLE = {
    "font.size": FONT + 0.5,
    "text.parse_math": False,  # a name may hold dollars
    "axes.titlesize": FONT + 1,
    "axes.labelsize": FONT + 0.5,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "legend.fontsize": FONT,
    "svg.hashsalt": "percov2",
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class MeasuredPoint:
    """A measured operating point of a system: means over the same pictures."""

    system: str
    bpp: float
    values: Mapping[str, float]


def label_of(metric: str) -> str:
    """Return the axis label of a metric."""
    other = f"{metric} (higher is better)" if metric.startswith(("clip", "miou")) else metric
    return METRIC_LABELS.get(metric, other)


def measured_points(paths: Sequence[Path]) -> tuple[list[MeasuredPoint], list[str]]:
    """Return the points of reports of eval kodak, realism and paper, and notes on those left out.

    A codec that has no file for some picture is left out, because its means cover fewer pictures.
    Raises ValueError if a file is no such report.
    """
    points: list[MeasuredPoint] = []
    notes: list[str] = []
    for path in paths:
        record = read_json(path)
        try:
            found, left_out = _points(record)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no report of percov2 eval kodak, realism or paper"
            ) from error
        points += [point for point in found if point not in points]  # a rival in two reports
        notes += [f"{note} ({path.parent.name}/{path.name})" for note in left_out]
    return points, notes


def _points(record: dict[str, Any]) -> tuple[list[MeasuredPoint], list[str]]:
    own = f"percov2 {record['model']}"
    if "measures" in record:
        values = {name: one["value"] for name, one in record["measures"].items() if one}
        return [MeasuredPoint(own, values.pop("bpp"), values)], []
    if "values" in record:
        return [_point(own, record["values"])], []
    points, notes = [_point(own, record["mean"])], []
    for name, entry in record["baselines"].items():
        missing = len(record["images"]) - len(entry["images"])
        if missing:
            notes.append(f"{name} is left out: no file for {missing} of its pictures")
        else:
            points.append(_point(entry["system"], entry["mean"]))
    return points, notes


_NO_METRICS = {"bytes", "bpp", "shown_bytes", "encode_s", "decode_s", "seconds"}


def _point(system: str, mean: Mapping[str, float | None]) -> MeasuredPoint:
    bpp = mean["bpp"]
    assert bpp is not None
    values = {key: v for key, v in mean.items() if v is not None and key not in _NO_METRICS}
    return MeasuredPoint(system, bpp, values)


def rates_figure(
    paths: Sequence[Path],
    out: Path,
    metrics: Sequence[str] = (),
    dataset: str | None = None,
) -> None:
    """Draw each metric over bits per pixel (PerCoV2, Figs. 4 and 7).

    Args:
        paths: report.json or realism.json files, one for each rate.
        out: the figure, PNG or SVG.
        metrics: the metrics to draw; all that were measured if empty.
        dataset: the data set whose published points are added, or None for no points.

    Raises ValueError if a file is no report, or if no point has a value of a metric.
    """
    points, notes = measured_points(paths)
    known = list(dict.fromkeys(name for point in points for name in point.values))
    shown = list(metrics) or [name for name in known if not name.startswith("clip")]
    for name in shown:
        if name not in known:
            raise ValueError(f"no file has values of {name!r}; choose from {', '.join(known)}")
    others: list[PublishedPoint] = []
    if dataset is not None:
        metric_names = [name for name in shown if name in PUBLISHED_METRICS]
        others = [p for p in published(dataset) if any(name in p.values for name in metric_names)]
    write_bytes(out, _draw_rates(points, shown, others, notes, _form(out)))


def rates_svg(
    points: Sequence[MeasuredPoint], others: Sequence[PublishedPoint], notes: Sequence[str] = ()
) -> str:
    """Return the figure of ``rates_figure`` as an svg element, for all measured metrics."""
    shown = list(dict.fromkeys(name for point in points for name in point.values))
    text = _draw_rates(points, shown, others, notes, "svg").decode()
    return text[text.index("<svg") :]


def clip_figure(paths: Sequence[Path], out: Path) -> None:
    """Draw CLIP scores over bits per pixel (PerCoV2, Fig. 6).

    The scores are the measures whose names start with "clip". Raises ValueError if there is none.
    """
    points, notes = measured_points(paths)
    names = list(dict.fromkeys(n for point in points for n in point.values if n[:4] == "clip"))
    if not names:
        raise ValueError("no file has a CLIP score, a measure whose name starts with clip")
    write_bytes(out, _draw_rates(points, names, [], notes, _form(out)))


def _draw_rates(
    points: Sequence[MeasuredPoint],
    metrics: Sequence[str],
    others: Sequence[PublishedPoint],
    notes: Sequence[str],
    form: str,
) -> bytes:
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    pyplot = _pyplot()
    with pyplot.rc_context(_STYLE):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(3.6 * columns + 0.4, 3.2 * rows), layout="constrained",
            squeeze=False, sharex=True,
        )  # fmt: skip
        handles: dict[str, Any] = {}
        styles = _styles(dict.fromkeys(point.system for point in points))
        hollow = _hollow(dict.fromkeys(point.system for point in others))
        for axis, metric in zip(grid.flat, metrics, strict=False):
            for system, style in hollow.items():
                mine = [p for p in others if p.system == system and metric in p.values]
                if mine:
                    x, y = [p.bpp for p in mine], [p.values[metric] for p in mine]
                    name = f"{system}, published"
                    handles[name] = axis.plot(x, y, label=name, **style)[0]
            for system, style in styles.items():
                line = sorted(
                    (p.bpp, p.values[metric])
                    for p in points
                    if p.system == system and metric in p.values
                )
                if line:
                    handles[system] = axis.plot(*zip(*line, strict=True), label=system, **style)[0]
            axis.set(xscale="log", xlabel="bits per pixel", title=label_of(metric))
            _tick_rates(axis)
            axis.tick_params(labelbottom=True)
            axis.grid(alpha=0.3)
        for axis in list(grid.flat)[len(metrics) :]:
            axis.remove()
        named = [*styles, *(f"{system}, published" for system in hollow)]
        _legend(figure, [(name, handles[name]) for name in named if name in handles])
        return _rendered(figure, form, [*_credits(others), *notes])


def _styles(systems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the line styles of measured systems."""
    names = list(systems)
    looks = zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_DASHES), strict=False)
    return {
        name: {"color": colour, "marker": marker, "linestyle": dash, "markersize": 6, "zorder": 3}
        for name, (colour, marker, dash) in zip(names, looks, strict=False)
    }


def _hollow(systems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the marker styles of published systems, which have no line."""
    look = {"color": _GREY, "markerfacecolor": "none", "linestyle": "none", "markersize": 6.5}
    return {
        name: {**look, "marker": marker, "zorder": 2}
        for name, marker in zip(systems, cycle(_HOLLOW), strict=False)
    }


def _credits(others: Sequence[PublishedPoint]) -> list[str]:
    """Return the lines below a figure that name the sources of published points."""
    if not others:
        return []
    sets = ", ".join(dict.fromkeys(point.dataset for point in others))
    lines = [
        f"Points named published are those of others on {sets}, not measured here. Pictures and "
        "protocol may differ. Sources:"
    ]
    return lines + [f"{', '.join(names)}: {source}" for source, names in sources(others).items()]


def _tick_rates(axis: Any) -> None:
    """Give a logarithmic axis of rates ticks at 1, 2 and 5 that are written as decimals."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def modes_figure(paths: Sequence[Path], out: Path) -> None:
    """Draw distortion over realism for the modes of modes.json files (PerCoV2, Fig. 1).

    A line joins the settings of the dial, or the numbers of steps if there is only one setting. The
    number at a point is that setting. Raises ValueError if a file is no modes.json.
    """
    records = []
    for path in paths:
        try:
            records += [{**record, "frechet": record["frechet"]} for record in read_json(path)]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no modes.json of percov2 eval modes") from error
    draw_modes(records, out)


def draw_modes(records: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw the figure of ``modes_figure`` from records of ``operating_modes``."""
    if not records:
        raise ValueError("no modes to draw")
    dialled = len({record["realism"] for record in records}) > 1
    joined, other = ("realism", "steps") if dialled else ("steps", "realism")
    rates = {record["rate"] for record in records}
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (r["rate"], r[other], r["guidance"])):
        name = f"{other} {record[other]:g}, guidance {record['guidance']:g}"
        name = f"{record['rate']}, {name}" if len(rates) > 1 else name
        lines.setdefault(name, []).append(record)
    pyplot = _pyplot()
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        styles = _styles(lines)
        for axis, metric in zip(axes, ("psnr", "lpips_alex"), strict=True):
            for name, style in styles.items():
                line = sorted(lines[name], key=lambda record: record[joined])
                axis.plot([r["frechet"] for r in line], [r[metric] for r in line], **style)
            axis.set(xlabel=METRIC_LABELS["frechet"], title=METRIC_LABELS[metric])
            axis.grid(alpha=0.3)
            axis.margins(0.12)
        counts = {(record["crops"], record["side"]) for record in records}
        crops = ", ".join(f"{count} held-out crops of {side}×{side}" for count, side in counts)
        figure.suptitle(f"{', '.join(sorted(rates))}: numbers are {joined}; {crops}")
        _legend(figure, list(zip(styles, axes[0].get_lines(), strict=True)))
        for axis, metric in zip(axes, ("psnr", "lpips_alex"), strict=True):
            _number(axis, [(r["frechet"], r[metric], f"{r[joined]:g}") for r in records])
        _save(figure, out)


def _freeze(figure: Any) -> None:
    """Lay a figure out, and keep that layout when more is added."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _number(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write the label of each point beside it, where it covers no other label, point or line."""
    from matplotlib.transforms import Bbox

    figure = axis.figure
    to_pixels = figure.dpi / 72
    places = [axis.transData.transform((x, y)) for x, y, _ in points]
    radius = 5 * to_pixels
    taken = [Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in places]
    for line in axis.get_lines():
        corners = axis.transData.transform(line.get_xydata())
        for start, end in pairwise(corners):
            along = np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / 3))[:, None]
            taken += [Bbox.from_bounds(x, y, 1, 1) for x, y in start + along * (end - start)]
    inside = axis.get_window_extent()
    for (x, y, label), (left, bottom) in zip(points, places, strict=True):
        text = axis.annotate(
            label, (x, y), (0, 0), textcoords="offset points", ha="center", va="center",
            arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.7, "shrinkB": 4},
        )  # fmt: skip
        size = text.get_window_extent()
        half = np.array([size.width, size.height]) / 2 + to_pixels
        for distance, turn in product((11, 17, 24, 32, 42, 54), range(16)):
            angle = pi / 4 + turn * pi / 8
            offset = np.array([cos(angle), sin(angle)]) * distance
            centre = np.array([left, bottom]) + offset * to_pixels
            box = Bbox([centre - half, centre + half])
            within = inside.contains(*box.min) and inside.contains(*box.max)
            if within and not any(box.overlaps(other) for other in taken):
                break
        text.set_position(tuple(offset))
        if distance < 18:
            text.arrow_patch.set_visible(False)
        taken.append(box)


_ACROSS = 4
"""The largest number of pictures beside each other."""


def pictures_figure(
    paths: Sequence[Path],
    out: Path,
    images: Sequence[str] = (),
    systems: Sequence[str] = (),
) -> None:
    """Draw rows of pictures: the original and each system, with bytes and factors (Figs. 2, 5).

    More than four pictures continue in the next row. The factor of a system is its number of bytes
    divided by that of the first percov2 file of the picture.

    Args:
        paths: report.json files; their folders hold the pictures.
        out: the figure, PNG or SVG.
        images: names of pictures, with or without ending; the first four if empty.
        systems: names of the systems to show, such as "vvc"; all if empty.

    Raises ValueError for unknown pictures or systems, and the errors of ``report.pictures_of``.
    """
    reports = [(path.parent, read_json(path)) for path in paths]
    try:
        names = [record["image"] for record in reports[0][1]["images"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{paths[0]} is no report of percov2 eval kodak") from error
    for image in images:
        if image not in names and image not in [Path(name).stem for name in names]:
            raise ValueError(f"no picture {image!r}; choose from {', '.join(names)}")
    chosen = [n for n in names if n in images or Path(n).stem in images] if images else names[:4]
    rows = [_row(reports, image, systems) for image in chosen]
    shown = {name for row in rows for name, _, _ in row}
    for system in systems:
        if not any(_is_of(name, system) for name in shown):
            raise ValueError(
                f"no system {system!r} among {', '.join(sorted(shown - {'original'}))}"
            )
    columns, width = min(_ACROSS, max(map(len, rows))), 2.5
    lines = [row[i : i + columns] for row in rows for i in range(0, len(row), columns)]
    heights = [width * max(p.shape[0] / p.shape[1] for _, _, p in line) + 0.45 for line in lines]
    pyplot = _pyplot()
    with pyplot.rc_context({**_STYLE, "savefig.dpi": 200}):
        figure, grid = pyplot.subplots(
            len(lines), columns, figsize=(columns * (width + 0.06), sum(heights)),
            height_ratios=heights, layout="constrained", squeeze=False,
        )  # fmt: skip
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
        for line, places in zip(lines, grid, strict=True):
            for axis in places:
                axis.axis("off")
            for (name, size, pixels), axis in zip(line, places, strict=False):
                axis.imshow(pixels, interpolation="lanczos")
                axis.set_title(f"{name}\n{size}", fontsize=FONT, loc="left")
        _save(figure, out)


def _row(
    reports: Sequence[tuple[Path, dict[str, Any]]], image: str, systems: Sequence[str]
) -> list[tuple[str, str, Any]]:
    """Return name, size and pixels of the original and of every system's picture."""
    row: list[tuple[str, str, Any]] = []
    unit = None
    for folder, report in reports:
        records = systems_of(report, image)
        if not records:
            raise ValueError(f"{folder} has no picture {image}")
        cells = pictures_of(report, folder, image)
        if not row:
            row.append((Path(image).stem, "original", np.asarray(cells[0][1])))
        for (name, record), (_, picture) in zip(records, cells[1:], strict=True):
            size = record.get("shown_bytes", record["bytes"])
            unit = unit or size
            bpp = 8 * size / (picture.width * picture.height)
            if not systems or any(_is_of(name, system) for system in systems):
                text = f"{size:,} bytes, {bpp:.4f} bpp, ×{size / unit:.2f}"
                row.append((name, text, np.asarray(picture)))
    return row


def _is_of(name: str, system: str) -> bool:
    """Return True if a name is a system or one of its operating points."""
    return name == system or name.startswith(f"{system} ")


_NUMBERED, _LARGE = (8, 8), (32, 48)
"""The two grids of a schedule: one with numbers, and that of a 768×512 photo."""


def schedules_figure(out: Path, names: Sequence[str] = ()) -> None:
    """Draw the stage maps of the entropy schedules (PerCoV2, Figs. 15–18).

    Each schedule is shown on a grid of 8×8 tokens with its stage numbers, and on the grid of a
    768×512 photo. Without ``names``, all schedules are drawn. Raises ValueError for unknown names.
    """
    chosen = list(names) or list(SCHEDULES)
    maps = [[stages(name, *grid) for grid in (_NUMBERED, _LARGE)] for name in chosen]
    pyplot = _pyplot()
    with pyplot.rc_context(_STYLE):
        columns = min(2, len(chosen))
        rows = -(-len(chosen) // columns)
        figure, grid = pyplot.subplots(
            rows, 2 * columns, figsize=(6.2 * columns, 2.75 * rows), layout="constrained",
            width_ratios=(1, 1.5) * columns, squeeze=False,
        )  # fmt: skip
        for axis in grid.flat:
            axis.axis("off")
        for i, (name, pair) in enumerate(zip(chosen, maps, strict=True)):
            row, column = divmod(i, columns)
            for j, stage_map in enumerate(pair):
                axis, count = grid[row, 2 * column + j], int(stage_map.max())
                axis.imshow(stage_map, cmap="viridis_r", vmin=1, vmax=max(count, 2))
                size = f"{stage_map.shape[0]}×{stage_map.shape[1]}"
                axis.set_title(f"{name}, {size}: {count} stages", fontsize=FONT)
            for (y, x), stage in np.ndenumerate(pair[0]):
                colour = "white" if stage > 0.55 * pair[0].max() else "black"
                axis = grid[row, 2 * column]
                axis.text(x, y, str(stage), color=colour, ha="center", va="center", fontsize=9)
        _save(figure, out)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _legend(figure: Any, entries: Sequence[tuple[str, Any]]) -> None:
    """Put a legend below the figure, in as many columns as fit its width."""
    _freeze(figure)
    longest = max(len(name) for name, _ in entries)
    columns = max(1, int(figure.get_figwidth() * 72 / (longest * FONT * 0.55 + 48)))
    figure.legend(
        [handle for _, handle in entries],
        [name for name, _ in entries],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=min(columns, len(entries)),
    )


def _form(out: Path) -> str:
    """Return the format of a figure's file. Raise ValueError unless it is PNG or SVG."""
    form = out.suffix.lower().removeprefix(".")
    if form not in ("png", "svg"):
        raise ValueError(f"{out}: a figure ends in .png or .svg")
    return form


def _save(figure: Any, out: Path, lines: Sequence[str] = ()) -> None:
    """Write a figure with lines of text below it, and close it."""
    write_bytes(out, _rendered(figure, _form(out), lines))


def _rendered(figure: Any, form: str, lines: Sequence[str] = ()) -> bytes:
    """Return a figure as PNG or SVG with lines of text below it, and close it."""
    width = int(figure.get_figwidth() * 72 / (FONT * 0.5))
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, width))
    if text:
        bottom = 0.0
        if figure.legends:
            bottom = figure.legends[0].get_window_extent().y0 / figure.bbox.height
        place = 0.01, bottom - 0.08 / figure.get_figheight()
        figure.text(*place, text, va="top", ha="left", fontsize=FONT, linespacing=1.3)
    stream = io.BytesIO()
    # No metadata: the same JSON gives the same bytes.
    extra = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    figure.savefig(stream, format=form, bbox_inches="tight", pad_inches=0.08, metadata=extra)
    _pyplot().close(figure)
    return stream.getvalue()
