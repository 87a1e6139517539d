"""Pages of labelled pictures: what figures do not say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from percov2.images import write_image

Cell = tuple[str, Image.Image]
"""A label and its picture."""
_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
_GAP = 6


def page(rows: Sequence[Sequence[Cell]], scale: float = 1.0, text_size: int = 14) -> Image.Image:
    """Rows of pictures, each under its label, on white.

    Args:
        rows: at least one, of one cell at least; pictures of a row may differ in size.
        scale: of the pictures.
        text_size: height of the labels in pixels.

    Raises:
        ValueError: no row, or a row without cells.
    """
    if not rows or not all(rows):
        raise ValueError("a page needs a row, and every row a picture")
    font = ImageFont.load_default(text_size)
    scaled = [[(label, _scaled(picture, scale)) for label, picture in row] for row in rows]
    labels = [[_lines(label, font, picture.width) for label, picture in row] for row in scaled]
    strips = [(text_size + 2) * max(map(len, row)) + 2 * _GAP for row in labels]
    heights = [max(picture.height for _, picture in row) for row in scaled]
    width = max(sum(picture.width + _GAP for _, picture in row) - _GAP for row in scaled)
    result = Image.new("RGB", (width, sum(strips) + sum(heights)), "white")
    draw = ImageDraw.Draw(result)
    top = 0
    for row, texts, strip, height in zip(scaled, labels, strips, heights, strict=True):
        left = 0
        for (_, picture), lines in zip(row, texts, strict=True):
            for i, line in enumerate(lines):
                draw.text((left, top + _GAP + i * (text_size + 2)), line, "black", font)
            result.paste(picture, (left, top + strip))
            left += picture.width + _GAP
        top += strip + height
    return result


def write_page(rows: Sequence[Sequence[Cell]], path: Path, scale: float = 1.0) -> None:
    """Write a page; the ending of ``path`` names the format. Errors as for ``page``."""
    write_image(page(rows, scale), path)


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    picture = picture.convert("RGB")
    if scale == 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _lines(label: str, font: _Font, width: int) -> list[str]:
    """The label in lines that fit into ``width``; a word that does not is cut."""
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
