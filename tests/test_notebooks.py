"""The notebooks of the tutorials run, and are stored without outputs."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

find = import_module if "CI" in os.environ else pytest.importorskip  # CI must not skip
nbclient, nbformat = find("nbclient"), find("nbformat")

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(place for place in sys.path if place))
    book = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=120, resources=resources).execute()
    assert all(cell.outputs for cell in book.cells[3:] if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"first_file", "own_entropy_model"}
