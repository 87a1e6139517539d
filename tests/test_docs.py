"""The pages point at files that exist, and code points at pages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.docs_scripts import script

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE = [
    path
    for folder in ("python", "tests", "benchmarks", "csrc", "triton_kernels", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and (path.suffix in {".py", ".h", ".cpp", ".cuh", ".toml", ".md"})
]
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)")
MENTION = re.compile(r"\bdocs/[\w/.-]+\.(?:md|py|png)\b")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", without_code(text_of(page)), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[\s-]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(without_code(text_of(page))):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


def test_mentioned_pages_exist() -> None:
    missing = [
        f"{path.relative_to(ROOT)} mentions {mention}"
        for path in [*PAGES, *CODE]
        for mention in MENTION.findall(text_of(path))
        if not (ROOT / mention).exists()
    ]
    assert not missing


def test_pages_name_files_that_exist() -> None:
    named = re.compile(r"`((?:tests|benchmarks|csrc|triton_kernels)/[\w/.*-]+\.[a-z]+)[`:]")
    missing = [
        f"{page.relative_to(ROOT)} names {name}"
        for page in PAGES
        for name in named.findall(text_of(page))
        if not any(ROOT.glob(name))
    ]
    assert not missing


def test_command_reference_has_commands_and_options() -> None:
    page = script("hooks").on_page_markdown(text_of(ROOT / "docs" / "reference" / "cli.md"))
    for command in ("compress", "decompress", "info", "eval kodak", "train sd3-export"):
        assert f"\n## percov2 {command}\n" in page
    assert "--target-bytes" in page and "<!--" not in page


def test_entropy_reference_names_every_public_module() -> None:
    page = script("hooks").on_page_markdown(
        text_of(ROOT / "docs" / "reference" / "api" / "entropy.md")
    )
    assert "\n::: percov2.entropy.rans\n" in page
    assert "\n::: percov2.entropy.torch.token_coder" in page
    assert "__init__" not in page


def test_architecture_names_files_that_exist() -> None:
    page = text_of(ROOT / "docs" / "explanation" / "architecture.md")
    named = re.findall(r"`((?:[\w]+/)+[\w.]*|\w+\.pyi?)`", page)
    assert len(named) > 50
    places = (ROOT, ROOT / "python" / "percov2")
    assert [name for name in named if not any((at / name).exists() for at in places)] == []


FIGURES = script("update_figures")
KODAK = FIGURES.facts_of(text_of(ROOT / FIGURES.PAGE))
MARKED = {
    "README.md": "r031.bytes r031.bpp r031.psnr r031.vvc.psnr r031.vvc.wins.dists "
    "r031.vvc.wins.lpips_alex count photos r010.bytes r002.bytes",
    "docs/how-to/target-bytes.md": "r031.bytes r010.bytes r002.bytes",
    "python/percov2/pretrained/tiny/README.md": "photos means",
}
"""The numbers of each page that come from the page on Kodak."""


@pytest.mark.parametrize("place", FIGURES.PLACES)
def test_numbers_of_kodak_agree_with_its_page(place: str) -> None:
    text = text_of(ROOT / place)
    assert {mark[2] for mark in FIGURES.MARK.finditer(text)} == set(MARKED[place].split())
    assert FIGURES.updated(text, KODAK) == text
    # A paragraph that began with a mark would be HTML, in which Markdown has no effect.
    begins = re.findall(r"^ *<!--kodak:([\w.]+)-->(?=.*<!--/-->)", text, re.MULTILINE)
    assert begins == []


@pytest.mark.parametrize("place", FIGURES.PLACES)
def test_numbers_of_kodak_are_marked(place: str) -> None:
    """A number written by hand beside a mark would stay when the mark's changes."""
    text = FIGURES.MARK.sub("", text_of(ROOT / place))
    assert not [rate for rate in ("r031", "r010") if f"{KODAK[f'{rate}.bytes']} bytes" in text]
    assert KODAK["r031.bytes"] not in text and KODAK["photos"] not in text


def test_the_page_on_kodak_agrees_with_itself() -> None:
    """The table of means repeats the last row of each rate's photos, and wins are counts."""
    page = text_of(ROOT / FIGURES.PAGE)
    rates = re.findall(r"^\| `(\w+)` \| ", KODAK["means"], re.MULTILINE)
    assert rates == ["r031", "r010", "r002"]
    for rate in rates:
        (section,) = re.findall(rf"^## `{rate}`(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)
        (mean,) = re.findall(r"^\| \*\*mean\*\* \| (.*) \|$", section, re.MULTILINE)
        own = [KODAK[f"{rate}.{measure}"] for measure in FIGURES.COLUMNS.values()]
        assert mean.split(" | ")[: len(own)] == own
        sizes = [
            row.split(" | ")[1] for row in re.findall(r"^\| kodim\d.*$", section, re.MULTILINE)
        ]
        assert len(sizes) == int(KODAK["count"])
        total = sum(int(size.replace(",", "")) for size in sizes)
        assert f"{total / len(sizes):,.0f}" == KODAK[f"{rate}.bytes"]
    wins = [int(value) for name, value in KODAK.items() if ".wins." in name]
    assert len(wins) == 2 * 7 * 5 and max(wins) <= int(KODAK["count"])


def test_marks_keep_their_decimals_and_need_a_fact() -> None:
    facts = {"a.bytes": "1,234", "a.psnr": "21.26", "photos": "x01–24", "b.psnr": "–"}
    mark = "<!--kodak:{}-->{}<!--/-->".format
    for name, old, new in (
        ("a.bytes", "9", "1,234"),
        ("a.psnr", "1.0", "21.3"),
        ("photos", "y", "x01–24"),
    ):
        text = f"on {mark(name, old)} and more"
        assert FIGURES.updated(text, facts) == f"on {mark(name, new)} and more"
    for name in ("b.psnr", "c.psnr"):
        with pytest.raises(ValueError, match=f"the report has no {name}"):
            FIGURES.updated(mark(name, "1"), facts)


def test_other_systems_are_not_taken_for_codecs_at_equal_bytes() -> None:
    table = "| codec | bytes | seconds |\n|---|---|---|\n| percov2 a | 9 | – |\n| x | 7 | 1.0 |\n"
    equal = "## `a`, model id 0, 1 step\n\n| codec | bytes |\n|---|---|\n| vvc | 8 |\n"
    assert FIGURES.facts_of(f"{equal}\n## Other systems\n\n{table}") == {"a.vvc.bytes": "8"}
