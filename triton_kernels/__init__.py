"""Triton kernels of percov2, installed as ``percov2.triton_kernels``.

Importing this package needs neither triton nor a GPU; calling a kernel needs both (the extra
``gpu``), or TRITON_INTERPRET=1 in the environment before the first call to run on CPU tensors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["nearest_codes"]


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the codebook vector with the greatest cosine similarity; the lowest wins ties.

    vectors: float32 [N, D], of any length (scaling a vector moves no maximum); codebook: float32
    [K, D], unit vectors. Returns int32 [N] in 0 .. K - 1. Raises RuntimeError if triton is not
    installed and ValueError for wrong shapes, dtypes or devices.
    """
    try:
        kernel = importlib.import_module(f"{__name__}.nearest")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise RuntimeError(
            "the GPU kernels need triton, which is not installed: pip install 'percov2[gpu]'"
        ) from error
    result: torch.Tensor = kernel.launch(vectors, codebook)
    return result
