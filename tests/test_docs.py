"""The pages point at files that exist, and code points at pages that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

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


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_reference_has_commands_and_options() -> None:
    page = hooks().on_page_markdown(text_of(ROOT / "docs" / "reference" / "cli.md"))
    for command in ("compress", "decompress", "info", "eval kodak", "train sd3-export"):
        assert f"\n## percov2 {command}\n" in page
    assert "--target-bytes" in page and "<!--" not in page


def test_entropy_reference_names_every_public_module() -> None:
    page = hooks().on_page_markdown(text_of(ROOT / "docs" / "reference" / "api" / "entropy.md"))
    assert "\n::: percov2.entropy.rans\n" in page
    assert "\n::: percov2.entropy.torch.token_coder" in page
    assert "__init__" not in page


def test_architecture_names_files_that_exist() -> None:
    page = text_of(ROOT / "docs" / "explanation" / "architecture.md")
    named = re.findall(r"`((?:[\w]+/)+[\w.]*|\w+\.pyi?)`", page)
    assert len(named) > 50
    places = (ROOT, ROOT / "python" / "percov2")
    assert [name for name in named if not any((at / name).exists() for at in places)] == []
