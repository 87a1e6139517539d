"""Independence from torch's process-wide settings: default dtype and device, autocast, seeds.

Other libraries and users change them, and our networks must load and run as without the change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["loading", "running"]

_PROCESS = os.getpid()
"""The process that imported this module."""


@contextmanager
def loading() -> Iterator[None]:
    """Construct networks on the CPU in float32, with weights that are ordinary tensors.

    The constructors draw random weights, so the global generator's state is restored afterwards.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        for name in ("register_parameter", "register_buffer"):
            # accelerate replaces them to put weights on the meta device.
            stack.callback(setattr, nn.Module, name, getattr(nn.Module, name))
            setattr(nn.Module, name, _of_torch(name))
        # Networks often load inside inference mode.
        stack.enter_context(torch.inference_mode(False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def _of_torch(name: str) -> Any:
    """Return torch's own method of a module, also if another function wraps it."""
    method = found = getattr(nn.Module, name)
    while found is not None and found.__module__ != nn.Module.__module__:
        cells = [cell.cell_contents for cell in found.__closure__ or ()]
        found = next((one for one in cells if getattr(one, "__name__", "") == name), None)
    return method if found is None else found


@contextmanager
def running(device: str) -> Iterator[None]:
    """Run networks on a device in the formats of their weights.

    In a forked process, torch's threads do not exist, and it would wait for them for ever. There it
    runs on one thread, as in the workers of its own loaders.
    """
    if os.getpid() != _PROCESS and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    kind = torch.device(device).type
    with ExitStack() as stack:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
