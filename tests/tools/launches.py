"""Counts of launches without a GPU: of Triton kernels, and of operators of torch."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Operators of torch that compute or copy, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        name = func._schema.name.removeprefix("aten::")
        fresh = name.startswith(("empty", "new_empty", "_unsafe_view", "lift_fresh", "detach"))
        if not fresh and all(alias.is_write for alias in written):
            self.started.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def count_kernels() -> Iterator[list[str]]:
    """Yield a list that gets an entry for each launch of a Triton kernel, which does not run."""
    started: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in ("int_linear", "int_layernorm", "stage_attention"):
            module = importlib.import_module(f"percov2.triton_kernels.{name}")
            count = mock.Mock(side_effect=lambda *_, **__: started.append("kernel"))
            stack.enter_context(mock.patch.object(module, "queue", count))
            stack.enter_context(mock.patch.object(module, "require_runnable", mock.Mock()))
        yield started
