"""Checks of devices, the sizes of grids, and the launch of kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton


def require_device(what: str, device: torch.device) -> None:
    """Raise ValueError unless kernels run on ``device``. Messages name the tensor ``what``.

    Kernels run on GPUs, and on the CPU if TRITON_INTERPRET=1 was set before triton was imported.
    """
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"{what} is on the CPU; move it to a GPU, or set TRITON_INTERPRET=1 before the "
            "first call to interpret the kernels"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{what} is on {device}; the Triton kernels run on cuda devices")


def require_runnable(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors are on one device that runs kernels."""
    first, *rest = tensors
    device = tensors[first].device
    for name in rest:
        if tensors[name].device != device:
            raise ValueError(f"{first} is on {device}, {name} on {tensors[name].device}")
    require_device(first, device)


def pieces(length: int, size: int) -> int:
    """Return the number of pieces that cover a length. (triton.cdiv is slower on the host.)"""
    return -(-length // size)


def padded(length: int) -> int:
    """Return the smallest power of two that is at least ``length``, which must be at least 1."""
    return 1 << (length - 1).bit_length()


def queue(
    kernel: Any, grid: tuple[int, ...], first: torch.Tensor, *rest: Any, **named: Any
) -> None:
    """Queue a kernel on the device of its first argument, on torch's current stream there.

    Triton itself would use the current device, which cannot read the tensors of another GPU.
    """
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](first, *rest, **named)
