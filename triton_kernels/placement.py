"""Where the tensors of a kernel may lie."""

from __future__ import annotations

import torch
import triton


def require_runnable(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors lie on one device on which kernels run.

    A GPU, or the CPU if TRITON_INTERPRET=1 was set before triton was imported.
    """
    first, *rest = tensors
    device = tensors[first].device
    for name in rest:
        if tensors[name].device != device:
            raise ValueError(f"{first} is on {device}, {name} on {tensors[name].device}")
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"{first} is on the CPU; move it to a GPU, or set TRITON_INTERPRET=1 before the "
            "first call to interpret the kernel"
        )
