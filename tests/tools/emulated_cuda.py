"""The CUDA kernels as a Python module built from tests/native: emulated on the CPU, or absent."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from percov2.entropy import rans
from percov2.entropy.torch import rans_cuda
from tools.native_programs import build, tools

_LOADED: dict[str, ModuleType] = {}
CALLS = ("cuda_built", "cuda_devices", "cuda_encode_sizes", "cuda_encode", "cuda_decode")


def module(request: pytest.FixtureRequest, name: str) -> ModuleType:
    """A Python module of tests/native."""
    if name in _LOADED:
        return _LOADED[name]
    tools("cmake", "c++")
    found = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode != 0:
        pytest.skip("needs pybind11")
    options = (f"-Dpybind11_DIR={found.stdout.strip()}", f"-DPython_EXECUTABLE={sys.executable}")
    path = Path(f"{build(request, 'native', name, *options)}")
    path = path.with_name(name + importlib.machinery.EXTENSION_SUFFIXES[0])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    _LOADED[name] = loaded
    return loaded


def use(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> None:
    """Make percov2.entropy.torch.rans_cuda run the kernels of a module, on CPU tensors."""
    for name in CALLS:
        monkeypatch.setattr(rans, name, getattr(kernels, name))
    monkeypatch.setattr(rans_cuda, "DEVICE_TYPE", "cpu")
