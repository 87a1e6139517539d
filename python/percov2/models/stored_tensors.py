"""The stored tensors of a network as float32 arrays: one folder with a safetensors file.

Matrices may be int8 with one float32 factor per row, the rest float16;
docs/reference/model-folder.md defines the files. ``percov2.models.torch.storage`` writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

__all__ = ["SCALE", "read_tensors"]

SCALE = ".scale"
"""Suffix of the tensor with the factors of an int8 matrix's rows."""


def read_tensors(path: Path, *names: str, restored: bool = True) -> dict[str, NDArray[Any]]:
    """Return tensors of a safetensors file by name.

    Args:
        path: the file.
        names: the tensors to read; all by default.
        restored: return float32 arrays (integers that are no matrices stay as they are); False for
            the stored ones, with the factors of int8 rows under ``NAME.scale``.

    Raises:
        ValueError: the file is missing or damaged, or lacks a tensor.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} contains no {path.name}, or it is no regular file")
    try:
        with safe_open(path, "np") as file:
            stored = set(file.keys())
            scales = {name + SCALE for name in stored} & stored
            chosen = names or (sorted(stored - scales) if restored else sorted(stored))
            tensors = {}
            for name in chosen:
                value = file.get_tensor(name)
                if restored and value.dtype == np.int8:
                    factors = file.get_tensor(name + SCALE)
                    value = value * factors.reshape(-1, *[1] * (value.ndim - 1))
                elif restored and value.dtype.kind == "f":
                    value = value.astype(np.float32, copy=False)
                tensors[name] = value
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or does not match: {error}") from error
    return tensors
