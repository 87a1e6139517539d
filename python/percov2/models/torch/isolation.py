"""Independence from torch's process-wide settings: default dtype and device, autocast, seeds.

Other libraries and users change them, and our networks must load and run as without the change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

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
        # Networks often load inside inference mode.
        stack.enter_context(torch.inference_mode(False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


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
