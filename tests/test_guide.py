"""The examples of the guide and of the docstrings of percov2.entropy run as shown."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import percov2.entropy

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(module.name for module in pkgutil.iter_modules(percov2.entropy.__path__))


@pytest.mark.parametrize("page", ["docs/how-to/entropy-library.md", "README.md"])
def test_the_blocks_of_a_page_run_in_order(page):
    """Those of the README that are about the library; the others need a photograph."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names: dict[str, object] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    if page == "README.md":
        blocks = [block for block in blocks if "percov2.entropy" in block[1]]
    assert blocks
    for block in blocks:
        # Empty lines in front, so that a traceback names the line of the page.
        lines = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines + block[1], page, "exec"), names)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(f"percov2.entropy.{name}"))
    assert not failed


def test_every_public_name_shows_its_use():
    finder = doctest.DocTestFinder(recurse=True)
    for name in percov2.entropy.__all__:
        value = getattr(percov2.entropy, name)
        if callable(value):
            tests = finder.find(value, name)
            assert any(test.examples for test in tests), f"{name} has no example in its docstring"
