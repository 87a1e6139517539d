"""Triton kernels run on the card of their tensors, not on the current card."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import percov2.triton_kernels
from tools.compiled_kernels import needs_triton


@needs_triton
@pytest.mark.parametrize("place", ["cuda:1", "cpu"])
def test_a_kernel_goes_to_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from percov2.triton_kernels import placement

    current: list[torch.device] = []
    seen: list[Any] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self._device = device

        def __enter__(self) -> None:
            current.append(self._device)

        def __exit__(self, *failure: object) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given, **named: seen.append((grid, given, named, list(current)))

    monkeypatch.setattr(torch.cuda, "device", Guard)
    device = torch.device(place)
    tensor = SimpleNamespace(device=device, is_cuda=device.type == "cuda")
    placement.queue(Kernel(), (7,), tensor, 5, SIZE=3)
    assert seen == [((7,), (tensor, 5), {"SIZE": 3}, [device] if tensor.is_cuda else [])]
    assert not current


def test_every_launch_goes_there() -> None:
    """A launch is written kernel[grid](...): in one place only."""
    folder = Path(str(percov2.triton_kernels.__file__)).parent
    launches = {
        path.name: len(re.findall(r"kernel\[", path.read_text(encoding="utf-8")))
        for path in folder.glob("*.py")
    }
    queued = [name for name in launches if name not in ("__init__.py", "placement.py")]
    assert [name for name, count in launches.items() if count] == ["placement.py"]
    assert all("queue(" in (folder / name).read_text(encoding="utf-8") for name in queued)
