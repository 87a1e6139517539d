"""The commands and programs of the tutorials run in their order and print what the pages say."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.tutorial_pages import run_page, scripts

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty folder."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.mark.parametrize("name", ["first-photo", "folder", "benchmark"])
def test_a_tutorial_runs_as_shown(name, folder):
    run_page(TUTORIALS / f"{name}.md", folder)


def test_the_tutorial_for_training_runs_with_few_steps(folder):
    run_page(TUTORIALS / "train-codec.md", folder, STEPS="3")


def test_the_tutorial_for_ray_runs_as_shown(folder):
    run_page(TUTORIALS / "ray.md", folder, RAY_worker_niceness="0")


def test_the_tutorial_for_python_runs_as_shown(folder):
    skimage = find_spec("skimage")
    assert skimage and skimage.submodule_search_locations
    shutil.copy(Path(skimage.submodule_search_locations[0]) / "data" / "coffee.png", folder)
    run_page(TUTORIALS / "python.md", folder)


def test_a_page_that_prints_something_else_is_found(folder):
    page = folder / "page.md"
    for block in ("```console\n$ echo 12\n13\n```\n", "```python\nprint(1)  # 2\n```\n"):
        page.write_text(block)
        with pytest.raises(AssertionError, match="prints no"):
            run_page(page, folder)
        shutil.rmtree(folder.parent / "here_bin")
    for block in ("```sh\nfalse\ntrue\n```\n", "```python\nprint(1)  # 1\nfalse\n```\n"):
        page.write_text(block)
        with pytest.raises(AssertionError, match="false"):
            run_page(page, folder)
        shutil.rmtree(folder.parent / "here_bin")


def test_lines_that_install_are_left_out():
    block = "```sh\npip install .\necho yes\n```\n"
    assert list(scripts(block)) == [("set -e\necho yes\n", [])]
