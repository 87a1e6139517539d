"""Pages of labelled pictures, and plots of quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from percov2.files import write_image

__all__ = ["Cell", "page", "plot_quality", "reduced", "write_page"]

Cell = tuple[str, Image.Image]
"""A label and a picture."""
_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
_GAP = 6
_TEXT = 14
"""Height of labels in pixels."""
_MOST = 65_000
"""Longest side of a page in pixels. JPEG allows 65,500."""


def page(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Return a white page with rows of pictures of any size, each under its label.

    Raises ValueError if there is no row, if a row has no cells, or if a side of the page would
    exceed 65,000 pixels.
    """
    if not rows or not all(rows):
        raise ValueError("a page needs at least one row, and every row needs a picture")
    font = ImageFont.load_default(_TEXT)
    labels = [[_lines(label, font, picture.width) for label, picture in row] for row in rows]
    strips = [(_TEXT + 2) * max(map(len, row)) + 2 * _GAP for row in labels]
    heights = [max(picture.height for _, picture in row) for row in rows]
    width = max(sum(picture.width + _GAP for _, picture in row) - _GAP for row in rows)
    size = (width, sum(strips) + sum(heights))
    if max(size) > _MOST:
        raise ValueError(f"a page of {size[0]}x{size[1]} is too large; show fewer pictures")
    result = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(result)
    top = 0
    for row, texts, strip, height in zip(rows, labels, strips, heights, strict=True):
        left = 0
        for (_, picture), lines in zip(row, texts, strict=True):
            for i, line in enumerate(lines):
                draw.text((left, top + _GAP + i * (_TEXT + 2)), line, "black", font)
            result.paste(picture.convert("RGB"), (left, top + strip))
            left += picture.width + _GAP
        top += strip + height
    return result


def write_page(rows: Sequence[Sequence[Cell]], path: Path) -> None:
    """Write a page to ``path``, whose ending gives the format. Errors are those of ``page``."""
    write_image(page(rows), path)


def reduced(picture: Image.Image, divisor: int) -> Image.Image:
    """Return a picture whose sides are divided by a number."""
    size = (max(1, picture.width // divisor), max(1, picture.height // divisor))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _lines(label: str, font: _Font, width: int) -> list[str]:
    """Split a label into lines that fit into ``width``. Cut words that are too long."""
    lines = [""]
    for word in label.split():
        while font.getlength(word) > width and len(word) > 1:
            word = word[:-2] + "…"
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def plot_quality(
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    x: tuple[str, str],
    number: str,
    title: str,
    path: Path,
) -> None:
    """Plot PSNR and LPIPS (AlexNet) against another measure, as PNG.

    Args:
        lines: the records of each line by the line's label. The label "" is for a single line
            without a legend.
        x: key and axis label of the other measure.
        number: key of the number that orders and labels the points of a line.
        title: title of the plot.
        path: file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    y = {"psnr": "PSNR, dB (higher is better)", "lpips_alex": "LPIPS, AlexNet (lower is better)"}
    for axis, (metric, label) in zip(axes, y.items(), strict=True):
        for name, records in lines.items():
            line = sorted(records, key=lambda record: record[number])
            axis.plot([r[x[0]] for r in line], [r[metric] for r in line], marker="o", label=name)
            for r in line:
                place, offset = (r[x[0]], r[metric]), (5, 4)
                axis.annotate(f"{r[number]:g}", place, offset, textcoords="offset points")
        axis.set(xlabel=x[1], ylabel=label)
        axis.grid(alpha=0.3)
    if "" not in lines:
        axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
