"""torch's process-wide settings neither change results nor are changed by loading and running."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch

from percov2 import BackboneOptions, Codec
from percov2.training.import_perco import import_perco
from tools import random_perco
from tools.photos import noise


@contextlib.contextmanager
def changed(change: Callable[[Any], object], value: object, before: object) -> Iterator[None]:
    """Change a process-wide setting, and change it back."""
    change(value)
    try:
        yield
    finally:
        change(before)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "float64": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: changed(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta": lambda: changed(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, True, False),
    "tf32": lambda: changed(torch.set_float32_matmul_precision, "medium", "highest"),
    "denormals": lambda: changed(torch.set_flush_denormal, True, False),
    "empty weights": accelerate.init_empty_weights,
    "anomaly": torch.autograd.detect_anomaly,
    "numpy raises": lambda: np.errstate(all="raise"),
}


@pytest.fixture(scope="module")
def perco_folder(tmp_path_factory) -> Path:
    published = tmp_path_factory.mktemp("published")
    for seed, grid in enumerate(random_perco.GRIDS):
        random_perco.save_pipeline(published / f"grid{grid}", grid, seed)
    out = tmp_path_factory.mktemp("imported") / "perco"
    import_perco(published, out)
    return out


@pytest.fixture(scope="module")
def openers(random_model, sd3_folder, perco_folder) -> dict[str, Callable[[], Codec]]:
    torch_runtime = BackboneOptions(runtime="torch")
    return {
        "tiny": lambda: Codec.from_pretrained(random_model, options=torch_runtime),
        "sd3": lambda: Codec.from_pretrained(f"sd3:{sd3_folder}"),
        "perco": lambda: Codec.from_pretrained(f"perco:{perco_folder}"),
    }


def file_and_picture(codec: Codec) -> tuple[bytes, np.ndarray]:
    side = 64
    file = codec.compress(noise(side, side, 0), caption="a red door")
    return file, np.asarray(codec.decompress(file, steps=2)).astype(int)


@pytest.fixture(scope="module")
def plain(openers) -> dict[str, tuple[bytes, np.ndarray]]:
    return {kind: file_and_picture(open_codec()) for kind, open_codec in openers.items()}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        *(("tiny", setting) for setting in SETTINGS),
        *(("sd3", setting) for setting in SETTINGS),
        *(("perco", setting) for setting in ("float64", "meta", "autocast")),
    ],
)
def test_results_do_not_depend_on_the_process(openers, plain, kind, setting):
    file, picture = plain[kind]
    used = openers[kind]()
    file_and_picture(used)  # its networks are loaded before the setting changes
    with SETTINGS[setting]():
        before = torch.get_default_dtype(), torch.get_default_device()
        for codec in (openers[kind](), used):
            found_file, found_picture = file_and_picture(codec)
            assert found_file == file
            assert np.abs(found_picture - picture).max() <= 1
        assert (torch.get_default_dtype(), torch.get_default_device()) == before


@pytest.mark.parametrize("kind", ["tiny", "sd3", "perco"])
def test_global_generators_are_left_alone(openers, kind):
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    file_and_picture(openers[kind]())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
