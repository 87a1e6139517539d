"""The HTML report: every picture and number is in it, it is safe, and it works in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from percov2.evaluation.html_report import html_page, write_html
from percov2.evaluation.published import published
from tools.command_line import output
from tools.photos import noise
from tools.reports import IMAGES, picture, write_report

ODD = '<b>&"\'x"</script><img src=http://example.com/x>'
VOID = {"meta", "img", "link", "br", "input", "hr"}


@pytest.fixture
def reports(tmp_path):
    rivals = {
        "vvc": ("codec", "vvc", None, 90, 0.4),
        ODD: ("command", ODD, f"{ODD} {{in}}", 1234, 0.35),
    }
    high = write_report(tmp_path / "high", "r2", 100, 0.5, **rivals)
    low = write_report(tmp_path / "low", "r1", 40, 0.3, vvc=("codec", "vvc", None, 39, 0.2))
    return [high, low]


class Page(HTMLParser):
    """The elements of a page, which must be closed in the order in which they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.captions: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "figcaption":
            self.captions.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "figcaption":
            self.captions[-1] += data


def test_every_picture_is_in_the_page(reports):
    page = Page(html_page(reports))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    # Per picture: the original once, two systems and percov2 of the first report, two of the second
    names = ["original", "percov2 r2", "vvc", ODD, "percov2 r1", "vvc"]
    assert [image["alt"] for image in images] == 2 * names
    seeds = [10 * j + i for i in range(2) for j in (0, 1, 2, 3, 1, 2)]
    for attributes, seed in zip(images, seeds, strict=True):
        data = base64.b64decode(attributes["src"].removeprefix("data:image/webp;base64,"))
        shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)
        errors = [np.abs(shown - np.asarray(picture(s))).mean() for s in sorted(set(seeds))]
        assert sorted(set(seeds))[int(np.argmin(errors))] == seed
    assert page.captions[0] == "original, 32×48"
    assert page.captions[1].startswith("percov2 r2, 100 bytes, 0.5208 bpp; PSNR, dB 25.00")


def test_every_number_is_in_a_table(reports):
    page = Page(html_page(reports))
    rows = {tuple(row[:3]): row[3:] for row in page.rows}
    for path in reports:
        report = json.loads(path.read_text())
        systems = {f"percov2 {report['rate']}": report, **report["baselines"]}
        for name, entry in systems.items():
            for record in entry["images"]:
                shown = rows[record["image"], name, report["rate"]]
                form = [f"{record['bytes']:,}", f"{record['bpp']:.4f}", f"{record['psnr']:.2f}"]
                assert shown[:3] == form
                values = [record["ms_ssim"], record["lpips_alex"], record["lpips_vgg"]]
                assert shown[3] == f"{values[0]:.4f}" and shown[4] == f"{values[1]:.3f}"
                assert shown[5] == "–"
    means = [row for row in page.rows if row[:1] == ["vvc"] and "at most" in row[1]]
    assert [row[1:5] for row in means] == [
        ["at most as many bytes (r2)", "2", "90", "0.4714"],
        ["at most as many bytes (r1)", "2", "40", "0.2057"],
    ]
    assert page.rows[0][:5] == ["system", "compared", "pictures", "bytes", "bpp"]


def test_names_are_text_and_nothing_is_requested(reports):
    text = html_page(reports)
    page = Page(text)
    assert ODD in {cell for row in page.rows for cell in row}
    assert "a <note> & more" not in text and "a &lt;note&gt; &amp; more" in text
    for tag, attributes in page.tags:
        assert tag not in ("b", "link", "iframe", "object", "embed")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name) or "data:"
            assert value.startswith(("data:", "#")), value
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not re.search(r"@import|url\((?!#)", text)
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_published_points_have_a_table_of_their_own(reports):
    text = html_page(reports, "Kodak")
    page = Page(text)
    heads = [i for i, row in enumerate(page.rows) if row[-1] == "source"]
    assert len(heads) == 1
    points = published("Kodak", coded=False)
    rows = page.rows[heads[0] + 1 : heads[0] + 1 + len(points)]
    assert [(row[0], row[-1]) for row in rows] == [(p.system, p.source) for p in points]
    measured = [row for row in page.rows if row not in rows]
    assert not any("DiffEIC" in cell for row in measured for cell in row)
    assert "Published for Kodak, not measured here" in text
    assert "Published" not in html_page(reports)


def test_realism_is_shown_with_intervals(reports, tmp_path):
    measures = {"bpp": {"value": 0.1, "interval": [0.09, 0.11]}, "dists": None}
    measures["kernel"] = {"value": 12.5, "interval": [11, 14]}
    judged = tmp_path / "realism.json"
    record = {"model": "small", "rate": "r1", "photos": 7, "measures": measures, "notes": []}
    judged.write_text(json.dumps(record))
    page = Page(html_page([judged, *reports]))
    assert ["small r1", "7", "0.1 [0.09, 0.11]", "–", "12.5 [11, 14]"] in page.rows
    assert "original" in [attributes.get("alt") for _, attributes in page.tags]
    assert Page(html_page([judged])).captions == []


def test_the_commands_write_a_page(reports, random_model, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert output(capsys, "eval", "html", *reports, "--out", out) == f"{out}\n"
    assert len(Page(out.read_text()).captions) == 12
    photos = tmp_path / "photos"
    photos.mkdir()
    noise(48, 64).save(photos / "p.png")
    folder = tmp_path / "out"
    common = ("eval", "kodak", photos, "--out", folder, "--model", random_model, "--steps", 1)
    assert f"{folder / 'report.html'}\n" in output(capsys, *common, "--html")
    assert len(Page((folder / "report.html").read_text()).captions) == 2


def test_in_a_browser_tables_sort_and_pictures_are_compared(reports, browser, tmp_path):
    out = tmp_path / "page.html"
    write_html(reports, out, "Kodak")
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    requests, faults = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto(out.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [out.as_uri()]
    column = "() => [...document.querySelectorAll('table')[0].tBodies[0].rows].map(r => {}.{})"

    def values(cell):
        return tab.evaluate(column.format(f"r.cells[{cell}]", "textContent"))

    tab.get_by_role("button", name="bytes").first.click()
    assert values(3) == ["40", "40", "90", "100", "1,234"]
    tab.get_by_role("button", name="bytes").first.click()
    assert values(3) == ["1,234", "100", "90", "40", "40"]
    assert tab.locator("th[aria-sort]").first.get_attribute("aria-sort") == "descending"

    section = tab.locator("section").first
    left, right = (section.get_by_label(f"{side} picture") for side in ("left", "right"))
    assert left.locator("option").count() == 6
    below = section.locator(".view > img")
    assert below.get_attribute("alt") == "percov2 r2"
    right.select_option(index=2)
    assert below.get_attribute("alt") == "vvc"
    slider = section.get_by_role("slider")
    slider.fill("20")
    assert "80%" in section.locator(".top").evaluate("e => e.style.clipPath")
    section.get_by_label("zoom in").click()
    assert "scale(2)" in below.evaluate("e => e.style.transform")
    box = section.locator(".view").bounding_box()
    tab.mouse.move(box["x"] + 200, box["y"] + 100)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 190, box["y"] + 70)
    tab.mouse.up()
    moved = below.evaluate("e => e.style.transform")
    assert moved == section.locator(".top img").evaluate("e => e.style.transform")
    x, y = (float(n) for n in re.findall(r"(-?[\d.]+)px", moved))
    assert x == pytest.approx(-box["width"] / 2 - 10) and y == pytest.approx(
        -box["height"] / 2 - 30
    )
    assert faults == []


def test_without_javascript_the_page_is_complete(reports, browser, tmp_path):
    out = tmp_path / "page.html"
    write_html(reports, out)
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto(out.as_uri())
    assert tab.locator("figure img:visible").count() == 6 * len(IMAGES)
    assert tab.get_by_role("button").count() == 0
    assert tab.get_by_text(ODD, exact=True).first.is_visible()
