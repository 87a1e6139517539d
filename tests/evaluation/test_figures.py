"""Figures from JSON: their lines and points, their texts, and what they refuse."""

from __future__ import annotations

import json
import re
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from percov2.entropy.schedule import SCHEDULES
from percov2.evaluation import figures
from percov2.evaluation.figures import (
    clip_figure,
    measured_points,
    modes_figure,
    pictures_figure,
    rates_figure,
    schedules_figure,
)
from percov2.evaluation.published import published
from tools.command_line import failure, output
from tools.reports import picture, write_report

ODD = "50$ & <x>$"


@pytest.fixture
def reports(tmp_path):
    """Two rates with a codec, one that has too few files, and two points of a rival."""
    rivals = {
        "vvc": ("codec", "vvc", None, 90, 0.4),
        "few": ("codec", "few", None, 80, 0.3),
        f"{ODD} 1": ("command", ODD, "x {in}", 60, 0.35),
        f"{ODD} 2": ("command", ODD, "x {in}", 200, 0.6),
    }
    high = write_report(tmp_path / "high", "r2", 100, 0.5, **rivals)
    low = write_report(tmp_path / "low", "r1", 40, 0.3, vvc=("codec", "vvc", None, 39, 0.2))
    return [high, low]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of their files."""
    kept = []
    render = figures._rendered

    def keep(figure, form, lines=()):
        kept.append((figure, list(lines)))
        return render(figure, form, lines)

    monkeypatch.setattr(figures, "_rendered", keep)
    return kept


def lines_of(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def texts(figure):
    """Return the texts that are drawn: not the labels of ticks beyond the ends of an axis."""
    import matplotlib.text

    figure.draw_without_rendering()  # places as on a canvas, not as in the file
    hidden = {
        id(label)
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not low <= tick.get_loc() <= high
    }
    found = figure.findobj(matplotlib.text.Text)
    return [t for t in found if t.get_text() and t.get_visible() and id(t) not in hidden]


def test_points_of_a_system_form_a_line_over_reports(reports, drawn, tmp_path):
    rates_figure(reports, tmp_path / "rates.png")
    ((figure, notes),) = drawn
    titles = [axis.get_title() for axis in figure.axes]
    names = ["PSNR, dB", "MS-SSIM", "LPIPS, AlexNet", "DISTS"]
    assert [title.split(" (")[0] for title in titles] == names
    lines = lines_of(figure.axes[0])
    assert set(lines) == {"percov2 small", "vvc", ODD}
    for name, line in lines.items():
        assert len(line.get_xdata()) == 2 and list(line.get_xdata()) == sorted(line.get_xdata())
        assert line.get_linestyle() != "None", name
    # Rates and values are means over both pictures.
    assert lines["vvc"].get_xdata()[0] == pytest.approx(8 * 39.5 / (32 * 48))
    np.testing.assert_allclose(lines["vvc"].get_ydata(), [22, 24])
    assert len({(line.get_marker(), line.get_color()) for line in lines.values()}) == 3
    assert notes == ["few is left out: no file for 1 of its pictures (high/report.json)"]
    with Image.open(tmp_path / "rates.png") as image:
        assert image.width > 800


def test_published_points_are_marked_and_no_line_joins_them(reports, drawn, tmp_path):
    rates_figure(reports, tmp_path / "rates.svg", ["psnr", "dists"], "Kodak")
    ((figure, notes),) = drawn
    lines = lines_of(figure.axes[1])
    points = published("Kodak", "dists")
    marked = {name: line for name, line in lines.items() if name.endswith(", published")}
    assert {f"{point.system}, published" for point in points} == set(marked)
    assert sum(len(line.get_xdata()) for line in marked.values()) == len(points)
    assert {line.get_linestyle() for line in marked.values()} == {"None"}
    assert len({line.get_marker() for line in marked.values()}) == len(marked)
    for source in {point.source for point in points}:
        assert any(source in note for note in notes)
    assert "those of others on Kodak, not measured here" in notes[0]
    assert set(lines) - set(marked) == {"percov2 small", "vvc", ODD}


def test_texts_are_large_enough_and_do_not_overlap(reports, drawn, tmp_path):
    rates_figure(reports, tmp_path / "rates.png", (), "Kodak")
    modes_figure([write_modes(tmp_path)], tmp_path / "modes.png")
    schedules_figure(tmp_path / "schedules.png")
    pictures_figure(reports, tmp_path / "pictures.png")
    assert len(drawn) == 4
    for figure, _ in drawn:
        shown = texts(figure)
        assert min(text.get_fontsize() for text in shown) >= 9
        boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in shown]
        for (one, a), (other, b) in combinations(boxes, 2):
            assert not a.overlaps(b), (one, other)


def write_modes(folder):
    records = []
    for guidance in (1.0, 2.0):
        for steps, frechet, psnr in (
            (1, 30, 22),
            (2, 24, 21.9),
            (4, 23.9, 21.89),
            (8, 23.8, 21.88),
        ):
            sizes = {"rate": "r1", "realism": 1.0, "crops": 9, "side": 64}
            measured = {"psnr": psnr - guidance / 50, "lpips_alex": psnr / 90, "frechet": frechet}
            records.append({**sizes, "steps": steps, "guidance": guidance, **measured})
    path = folder / "modes.json"
    path.write_text(json.dumps(records))
    return path


def test_a_mode_is_a_numbered_point(drawn, tmp_path):
    modes_figure([write_modes(tmp_path)], tmp_path / "modes.png")
    ((figure, _),) = drawn
    for axis in figure.axes:
        assert [len(line.get_xdata()) for line in axis.get_lines()] == [4, 4]
        assert sorted(text.get_text() for text in axis.texts) == sorted("1248" * 2)
    assert figure.axes[0].get_lines()[1].get_ydata()[0] == pytest.approx(22 - 0.04)
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_xdata(), [30, 24, 23.9, 23.8])


def test_clip_scores_are_drawn_and_must_exist(reports, drawn, tmp_path):
    with pytest.raises(ValueError, match="no file has a CLIP score"):
        clip_figure(reports, tmp_path / "clip.png")
    measures = {"bpp": {"value": 0.1}, "clip_text": {"value": 0.3}, "clip_image": None}
    judged = tmp_path / "realism.json"
    judged.write_text(json.dumps({"model": "small", "rate": "r1", "measures": measures}))
    clip_figure([judged, *reports], tmp_path / "clip.png")
    ((figure, _),) = drawn
    assert [axis.get_title() for axis in figure.axes] == ["clip_text (higher is better)"]
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [0.1] and list(line.get_ydata()) == [0.3]


def test_rows_of_pictures_show_bytes_and_factors(reports, drawn, tmp_path):
    pictures_figure(reports, tmp_path / "pictures.png", ["b"], ["percov2", "vvc"])
    ((figure, _),) = drawn
    filled = [axis for axis in figure.axes if axis.get_images()]
    assert len(figure.axes) == 2 * 4
    titles = [axis.get_title(loc="left").split("\n") for axis in filled]
    assert [title[0] for title in titles] == ["b", "percov2 r2", "vvc", "percov2 r1", "vvc"]
    assert titles[0][1] == "original"
    assert titles[1][1].startswith("101 bytes, 0.5260 bpp, ×1.00")
    assert titles[3][1].startswith("41 bytes") and titles[3][1].endswith(f"×{41 / 101:.2f}")
    shown = [axis.get_images()[0].get_array() for axis in filled]
    for pixels, seed in zip(shown, (1, 11, 21, 11, 21), strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(picture(seed)))


def test_every_schedule_is_drawn_with_its_stage_numbers(drawn, tmp_path):
    schedules_figure(tmp_path / "all.png")
    schedules_figure(tmp_path / "one.png", ["checkerboard"])
    (every, _), (one, _) = drawn
    assert sum(bool(axis.get_images()) for axis in every.axes) == 2 * len(SCHEDULES)
    left, right = one.axes
    assert [text.get_text() for text in left.texts[:4]] == ["1", "2", "1", "2"]
    assert len(left.texts) == 64 and right.get_images()[0].get_array().shape == (32, 48)
    with pytest.raises(ValueError, match="spiral"):
        schedules_figure(tmp_path / "x.png", ["spiral"])


def test_a_figure_is_the_same_for_the_same_json(reports, tmp_path):
    for ending in ("png", "svg"):
        for name in ("one", "two"):
            rates_figure(reports, tmp_path / f"{name}.{ending}", ["psnr"])
        one, two = (tmp_path / f"{name}.{ending}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_other_files_are_refused(reports, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"model": "x"}')
    for draw in (rates_figure, clip_figure, pictures_figure):
        with pytest.raises(ValueError, match=r"other\.json is no report"):
            draw([other], tmp_path / "x.png")
    for path in (other, reports[0]):
        with pytest.raises(ValueError, match=r"is no modes\.json"):
            modes_figure([path], tmp_path / "x.png")
    with pytest.raises(ValueError, match="no file has values of 'fid'; choose from psnr"):
        rates_figure(reports, tmp_path / "x.png", ["fid"])
    with pytest.raises(ValueError, match=r"x\.pdf: a figure ends in \.png or \.svg"):
        rates_figure(reports, tmp_path / "x.pdf")
    with pytest.raises(ValueError, match=r"no picture 'c'; choose from a\.png"):
        pictures_figure(reports, tmp_path / "x.png", ["c"])
    with pytest.raises(ValueError, match="no system 'jpeg' among"):
        pictures_figure(reports, tmp_path / "x.png", (), ["jpeg"])
    assert len(measured_points([*reports, reports[0]])[0]) == 6


def test_the_command_draws_every_kind(reports, tmp_path, capsys):
    modes = write_modes(tmp_path)
    for kind, files, options in [
        ("modes", [modes], []),
        ("rates", reports, ["--metrics", "psnr,dists", "--published", "Kodak"]),
        ("pictures", reports, ["--images", "a,b.png", "--systems", "percov2"]),
        ("schedules", [], ["--schedules", "var"]),
    ]:
        out = tmp_path / f"{kind}.svg"
        printed = output(capsys, "eval", "figure", kind, *files, "--out", out, *options)
        assert printed == f"{out}\n"
        assert re.search(r"<svg [^>]*viewBox", out.read_text())
    command = ("eval", "figure", "clip", *reports, "--out", tmp_path / "clip.png")
    assert "eval figure clip: no file has a CLIP score" in failure(capsys, *command)
    unknown = ("eval", "figure", "rates", *reports, "--out", tmp_path / "x.png")
    said = failure(capsys, *unknown, "--published", "kodak")
    assert "no published points of 'kodak'; choose from Kodak" in said
