"""Bring the numbers measured on Kodak up to date, from a report of ``percov2 eval report``.

``python docs/update_figures.py OUT/report.json`` puts the report's page into docs/results/kodak.md,
copies its pictures to docs/images, and then takes the marked numbers of README.md and of the model
card, and of other pages, from that page. Without a report, only the last step is done.

A mark is an HTML comment before a number or a table, and ``<!--/-->`` ends it, as in
``takes <!--kodak:r031.bytes-->1,149<!--/--> bytes``. A number keeps its count of decimals. A line
must not begin with a mark that stands before a number.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/results/kodak.md"
PLACES = ("README.md", "docs/how-to/target-bytes.md", "python/percov2/pretrained/tiny/README.md")
"""The files that take numbers from the page."""
MARK = re.compile(r"(<!--kodak:([\w.]+)-->)(.*?)(<!--/-->)", re.DOTALL)
COLUMNS = {
    "bytes": "bytes",
    "bpp": "bpp",
    "PSNR, dB": "psnr",
    "MS-SSIM": "ms_ssim",
    "LPIPS (AlexNet)": "lpips_alex",
    "LPIPS (VGG)": "lpips_vgg",
    "DISTS": "dists",
}
"""The columns of the page's tables, and their names in marks."""


def facts_of(page: str) -> dict[str, str]:
    """Return the numbers of a page by name.

    The names are ``photos`` and ``count`` (which photos, and their number), ``means`` (the table),
    ``RATE.MEASURE``, ``RATE.CODEC.MEASURE`` (at equal bytes) and ``RATE.CODEC.wins.MEASURE`` (the
    number of photos on which percov2 is better).
    """
    found = {}
    if named := re.search(r"^- Photos: (.+?)\. ", page, re.MULTILINE):
        found["photos"] = named[1]
    for part in re.split(r"^## ", page, flags=re.MULTILINE):
        heading = re.match(r"`([^`]+)`, model id ", part)
        rate = heading[1] if heading else ""
        for table in re.findall(r"(?:^\|.*\|\n)+", part + "\n", re.MULTILINE):
            first, head, rows = _cells(table)
            for name, cells in rows:
                if first == "rate":
                    found["means"], place = f"\n\n{table}\n", name.strip("`")
                elif first == "codec" and rate and not name.startswith("percov2 "):
                    place = f"{rate}.{name}"
                elif first == "percov2 is better than":
                    codec, found["count"] = re.split(r", on … of ", name)
                    place = f"{rate}.{codec}.wins"
                else:
                    continue
                found |= {
                    f"{place}.{COLUMNS[title]}": cell
                    for title, cell in zip(head, cells, strict=True)
                }
    return found


def _cells(table: str) -> tuple[str, list[str], list[tuple[str, list[str]]]]:
    """Return a table's first title, its other titles, and the name and cells of every row."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    (first, *head), _, *rows = lines
    return first, head, [(name, cells) for name, *cells in rows]


def updated(text: str, facts: Mapping[str, str]) -> str:
    """Return a text with the facts at its marks. Raise ValueError for a mark without a fact."""

    def fact(mark: re.Match[str]) -> str:
        new = facts.get(mark[2], "–")
        if new == "–":
            raise ValueError(f"the report has no {mark[2]}; change the text around its mark")
        old = mark[3]
        if re.fullmatch(r"[\d,]+(\.\d+)?", old):
            decimals = len(old.partition(".")[2])
            new = f"{Decimal(new.replace(',', '')):,.{decimals}f}"
        return f"{mark[1]}{new}{mark[4]}"

    return MARK.sub(fact, text)


def update(report: Path | None = None, root: Path = ROOT) -> list[Path]:
    """Update the page from a report, and the other files from the page. Return what changed."""
    page = root / PAGE
    new = {page: page.read_text(encoding="utf-8")}
    if report is not None:
        new[page] = updated(new[page], {"page": _block(report, root)})
    facts = facts_of(new[page])
    for place in PLACES:
        new[root / place] = updated((root / place).read_text(encoding="utf-8"), facts)
    changed = [path for path, text in new.items() if path.read_text(encoding="utf-8") != text]
    for path in changed:
        path.write_text(new[path], encoding="utf-8")
    return changed


def _block(report: Path, root: Path) -> str:
    """Return a report's page without its title, and copy its pictures to docs/images."""
    from percov2.evaluation.rates import rates_page
    from percov2.stored_files import read_json

    _, _, text = rates_page(read_json(report)).partition("\n")

    def copied(link: re.Match[str]) -> str:
        name = f"kodak_{link[1]}"
        shutil.copyfile(report.parent / link[1], root / "docs" / "images" / name)
        return f"](../images/{name})"

    return "\n" + re.sub(r"\]\(([\w.]+)\)", copied, text) + "\n"


if __name__ == "__main__":
    for path in update(*map(Path, sys.argv[1:])):
        print(path.relative_to(ROOT))
