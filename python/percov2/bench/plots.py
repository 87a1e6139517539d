"""Plots of a report: throughput, bytes above the ideal, cost per image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from percov2.bench.timing import Record

__all__ = ["require_matplotlib", "write_plots"]


def require_matplotlib() -> None:
    """Raise ValueError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install 'percov2[eval]'") from error
    matplotlib.use("Agg")


def write_plots(report: Record, folder: Path) -> list[Path]:
    """Write the plots of a report as PNG files into ``folder``. Return their paths.

    Raises:
        ValueError: matplotlib is missing.
        OSError: a file cannot be written.
    """
    require_matplotlib()
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    by_section: dict[str, list[Record]] = {}
    for record in report["records"]:
        by_section.setdefault(record["section"], []).append(record)
    written = []
    plots = {"logits": _throughput, "overhead": _overhead, "model": _cost}
    names = {"logits": "throughput", "overhead": "overhead", "model": "cost_per_image"}
    for section, draw in plots.items():
        for figure in draw(by_section.get(section, [])):
            written.append(folder / f"{names[section]}.png")
            figure.savefig(written[-1], dpi=120)
            plt.close(figure)
    return written


def _figure(panels: int = 1) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(9.0, 4.5), layout="constrained", squeeze=False)
    return figure, axes[0]


def _throughput(records: list[Record]) -> Iterator[Any]:
    """Draw one panel per codebook, for its first shape, with bars for each coder."""
    panels: dict[int, dict[tuple[str, str], Record]] = {}
    for r in records:
        panels.setdefault(r["codebook"], {}).setdefault((r["coder"], r["given"]), r)
    if panels:
        figure, axes = _figure(len(panels))
        for axis, (codebook, bars) in zip(axes, sorted(panels.items()), strict=True):
            for offset, way in ((-0.2, "encode"), (0.2, "decode")):
                rates = [r[way]["msym_per_s"] for r in bars.values()]
                axis.barh([i + offset for i in range(len(bars))], rates, 0.38, label=way)
            names = [f"{coder}\n{given}" if axis is axes[0] else "" for coder, given in bars]
            axis.set(xscale="log", title=f"V = {codebook}")
            axis.set_yticks(range(len(bars)), names)
            axis.tick_params(labelsize=7)
            axis.invert_yaxis()
        axes[0].legend(fontsize=7)
        figure.supxlabel("million symbols per second, one thread")
        yield figure


def _overhead(records: list[Record]) -> Iterator[Any]:
    """Draw the bytes per image above the ideal, with one group of bars per shape."""
    values: dict[str, dict[str, float]] = {}
    for r in records:
        shape = f"V = {r['codebook']}, {r['tokens']} tokens"
        values.setdefault(r["coder"], {})[shape] = r["above_ideal"]
    if values:
        shapes = list(dict.fromkeys(shape for group in values.values() for shape in group))
        width = 0.8 / len(values)
        figure, (axis,) = _figure()
        for i, (coder, group) in enumerate(values.items()):
            places = [shapes.index(shape) + i * width for shape in group]
            axis.bar(places, list(group.values()), width, label=coder)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(shapes))], shapes)
        axis.set_ylabel("bytes per image above the ideal, beyond the check")
        axis.legend(fontsize=7)
        yield figure


def _cost(records: list[Record]) -> Iterator[Any]:
    """Draw the milliseconds per image against the number of images, on one thread."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        if r["threads"] == 1:
            name = f"{r['what']}, {r['schedule']}, {r['grid']}x{r['grid']}"
            lines.setdefault(name, []).append((r["images"], r["ms_per_image"]))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if lines:
        figure, (axis,) = _figure()
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set(xlabel="images per call", ylabel="milliseconds per image")
        axis.legend(fontsize=7)
        yield figure
