"""The stored tensors of a network as float32 arrays: one folder with a safetensors file.

Matrices may be int8 with one float32 factor per row, the rest float16;
docs/reference/model-folder.md defines the files. ``percov2.models.torch.storage`` writes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load

from percov2.stored_files import check_regular, one_line, read_regular

__all__ = ["MOST_BYTES", "SCALE", "read_network", "read_tensors", "read_weights"]

MOST_BYTES = 1 << 30
"""Largest file of weights or graph of a small model, which is read whole."""
SCALE = ".scale"
"""Suffix of the tensor with the factors of an int8 matrix's rows."""


def read_tensors(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Return tensors of a safetensors file by name, all by default; only these are read.

    Values are float32, and integers that are no matrices stay as they are.

    Raises:
        ValueError: the file is missing or damaged, or lacks a tensor.
    """
    check_regular(path)
    try:
        with safe_open(path, "np") as file:
            return _restored(names, set(file.keys()), file.get_tensor)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or does not match: {one_line(error)}") from error


def read_network(path: Path, shapes: dict[str, str]) -> dict[str, NDArray[Any]]:
    """Return all tensors of a small network, whose names and shapes are known.

    Args:
        path: the file.
        shapes: the shape of each tensor: a letter per axis, the same for equal lengths, and 1.

    Raises:
        ValueError: the file is missing or damaged, or its tensors have other names or shapes, or a
            number is not finite.
    """
    tensors = read_tensors(path)
    lengths = {"1": 1}
    for name in sorted(shapes.keys() | tensors.keys()):
        value, axes = tensors.get(name), shapes.get(name)
        if value is None or axes is None:
            state = "lacks the tensor" if value is None else "has an unknown tensor"
            raise ValueError(f"{path} {state} {name}; the file belongs to another network")
        fits = value.ndim == len(axes) and all(
            lengths.setdefault(axis, length) == length
            for axis, length in zip(axes, value.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{path}: {name} has shape {value.shape}, which does not match")
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} contains numbers that are not finite")
    return tensors


def read_weights(path: Path, prefix: str, int8: bool) -> tuple[dict[str, NDArray[Any]], str]:
    """Read a safetensors file once: return tensors for a graph, and the SHA-256 of the file.

    Args:
        path: the file.
        prefix: return the tensors whose names begin so.
        int8: return the int8 matrices as they are stored, and the factors of their rows under
            ``NAME.scale``, and nothing else; False for tensors as ``read_tensors`` gives them.

    Raises:
        ValueError: the file is missing or damaged.
    """
    content = read_regular(path, MOST_BYTES)
    try:
        stored = {name: value for name, value in load(content).items() if name.startswith(prefix)}
        if int8:
            matrices = {name for name in stored if name + SCALE in stored}
            kept = matrices | {name + SCALE for name in matrices}
            tensors = {name: stored[name] for name in sorted(kept)}
        else:
            tensors = _restored((), set(stored), stored.__getitem__)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or does not match: {one_line(error)}") from error
    return tensors, hashlib.sha256(content).hexdigest()


def _restored(
    names: tuple[str, ...], stored: set[str], get: Callable[[str], NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    scales = {name + SCALE for name in stored} & stored
    tensors = {}
    for name in names or sorted(stored - scales):
        value = get(name)
        if value.dtype == np.int8:
            factors = get(name + SCALE)
            if factors.shape != value.shape[:1]:
                raise ValueError(f"{name} has {len(value)} rows, but {factors.size} factors")
            value = value * factors.reshape(-1, *[1] * (value.ndim - 1))
        elif value.dtype.kind == "f":
            value = value.astype(np.float32, copy=False)
        tensors[name] = value
    return tensors
