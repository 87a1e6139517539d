"""Fixtures that several test files use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from percov2.entropy import rans
from tools.photos import noise, store_photos

# Each of pytest's workers has one core. Threads that wait for each other would double the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    import torch

    from percov2.codec import Codec


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``cuda`` need a card; FAIL_WITHOUT_CUDA=1 makes failures of their skips."""
    if item.get_closest_marker("cuda") is None:
        return
    import torch

    if not torch.cuda.is_available():
        if os.environ.get("FAIL_WITHOUT_CUDA"):
            pytest.fail("FAIL_WITHOUT_CUDA is set, but torch finds no CUDA device")
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """The folder of a small model with random weights."""
    from tools import random_model as builder

    return builder.build(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture
def browser() -> Any:
    """A headless Chromium under playwright; FAIL_WITHOUT_BROWSER=1 makes a failure of the skip."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None or find_spec("playwright") is None:
        reason = "no chromium, or no package playwright"
        if os.environ.get("FAIL_WITHOUT_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory) -> Path:
    """The folder of an "sd3" model with random weights; its base model lies beside it."""
    from tools import random_sd3

    return random_sd3.build(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def sd3_copy(sd3_folder, tmp_path) -> Path:
    """A copy of that model, beside a copy of its base model."""
    return shutil.copytree(sd3_folder.parent, tmp_path / "copy") / "model"


@pytest.fixture(scope="session")
def codec(random_model) -> Codec:
    """A codec with that model."""
    from percov2.codec import Codec

    return Codec(Codec.from_pretrained(random_model).model, captions=None)


@pytest.fixture
def picture(tmp_path) -> Path:
    """A PNG of 70x50 pixels."""
    noise(70, 50).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def file(picture, codec, tmp_path) -> Path:
    """That picture as a file with a caption."""
    path = tmp_path / "photo.pcv2"
    with Image.open(picture) as image:
        path.write_bytes(codec.compress([image], caption=["a red door"])[0])
    return path


@pytest.fixture(params=rans.instruction_sets())
def instruction_set(request) -> Iterator[str]:
    """Every instruction set of this machine, in use."""
    before = rans.instruction_set()
    rans.use_instruction_set(request.param)
    yield request.param
    rans.use_instruction_set(before)


@pytest.fixture(params=["emulation", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch) -> torch.device:
    """Where the kernels of ``rans_cuda`` run: emulated on the CPU, and on a card."""
    import torch

    if request.param == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    from tools import emulated_cuda

    emulated_cuda.use(monkeypatch, emulated_cuda.module(request, "emulated_cuda"))
    return torch.device("cpu")


@pytest.fixture(scope="session")
def photo_cache(tmp_path_factory) -> Path:
    """Three small photos as `percov2 train data` writes them, two with a caption."""
    sizes = [(64, 96), (96, 64), (72, 80)]
    return store_photos(tmp_path_factory.mktemp("photos"), sizes, 8)
