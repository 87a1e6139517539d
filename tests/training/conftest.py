"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from percov2.training.stage1 import CodecStage
from tools.rate_runs import config_text, trained


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps one precision per process; every test has its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def first(photo_cache, tmp_path_factory) -> tuple[CodecStage, Path]:
    """The codec phase with one rate after three steps, and the folder of its run."""
    folder = tmp_path_factory.mktemp("first")
    return trained(folder, photo_cache, config_text(["r031"], steps=3)), folder / "run"
