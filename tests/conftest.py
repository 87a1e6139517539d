"""Fixtures that several test files use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from percov2.codec import Codec


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model with random weights."""
    import random_model as builder

    return builder.build(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="session")
def codec(random_model: Path) -> Codec:
    """A codec with that model."""
    from percov2.codec import Codec

    return Codec.from_pretrained(random_model)
