"""Pages of pictures: every picture is on the page, unchanged, with its label."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from percov2.evaluation.gallery import page, reduced, write_page

RED, BLUE = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))


def test_pictures_stand_in_rows_below_their_labels():
    pixels = np.asarray(page([[("a", RED), ("b", BLUE)], [("c", BLUE)]]))
    strip = 16 + 2 * 6
    assert pixels.shape == (2 * (strip + 40), 2 * 60 + 6, 3)
    assert (pixels[strip : strip + 40, :60] == (255, 0, 0)).all()
    assert (pixels[strip : strip + 40, 66:126] == (0, 0, 255)).all()
    assert (pixels[2 * strip + 40 :, :60] == (0, 0, 255)).all()
    assert (pixels[2 * strip + 40 :, 60:] == 255).all()
    for top, left in ((0, 0), (0, 66), (strip + 40, 0)):
        assert pixels[top : top + strip, left : left + 60].min() < 100  # the label's ink


def test_long_labels_are_broken_and_stay_above_their_pictures(tmp_path):
    pixels = np.asarray(page([[("three words here", RED), ("x", BLUE)]]))
    lines = (pixels.shape[0] - 40 - 12) // 16
    assert pixels.shape[1] == 126 and lines >= 2
    for i in range(lines):
        assert pixels[6 + 16 * i : 22 + 16 * i, :60].min() < 100
    pixels = np.asarray(page([[("w" * 40, RED), ("", BLUE)]]))
    assert pixels.shape[0] == 40 + 12 + 16
    assert (pixels[:20, 60:] == 255).all()
    write_page([[("a", reduced(RED, 2)), ("b", reduced(BLUE, 2))]], tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (2 * 30 + 6, 16 + 12 + 20)


def test_empty_pages_are_refused():
    for rows in ([], [[]], [[("a", RED)], []]):
        with pytest.raises(ValueError, match="row"):
            page(rows)
    with pytest.raises(ValueError, match="show fewer"):
        page([[("a", RED)]] * 1000)
