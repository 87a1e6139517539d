"""Placement and loading of a large backbone's networks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from percov2.models.backbone import BackboneOptions
from percov2.models.torch.isolation import loading
from percov2.stored_files import one_line

__all__ = ["TORCH_DTYPES", "Placement", "base_location", "load_part"]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats by the names of ``BackboneOptions``."""


@dataclass(frozen=True)
class Placement:
    """Device and dtype of a base model's networks.

    With ``offload``, networks stay in CPU memory, and only the running one is on the device.
    """

    device: str
    dtype: torch.dtype
    offload: bool

    @classmethod
    def of(cls, device: str, options: BackboneOptions) -> Placement:
        """Return the placement for a device, as set by the options."""
        default = "fp32" if torch.device(device).type == "cpu" else "bf16"
        return cls(device, TORCH_DTYPES[options.dtype or default], options.offload)

    def settle(self, network: nn.Module) -> Any:
        """Prepare a loaded network for inference and move it to where it stays."""
        network.eval().requires_grad_(False)
        return network if self.offload else network.to(self.device)

    @contextmanager
    def at_work(self, network: nn.Module) -> Iterator[None]:
        """Keep the network on the device inside the context."""
        if not self.offload:
            yield
            return
        network.to(self.device)
        try:
            yield
        finally:
            network.to("cpu")


def base_location(folder: Path, base: str) -> str:
    """Return the location of a model folder's base model for ``from_pretrained``.

    ``base`` is a hub id, a folder, or a folder relative to ``folder`` if it starts with a dot.
    Raises ValueError for anything else.
    """
    place = folder / base if base.startswith(".") else Path(base)
    if place.is_dir():
        return str(place)
    if base.startswith(".") or not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise ValueError(
            f"{folder / 'config.json'}: base is {base!r}; there is no folder {place}, and it is no "
            "hub id"
        )
    return base


@loading()
def load_part(kind: Any, location: str, subfolder: str, **options: Any) -> Any:
    """Load a network, tokenizer or scheduler of a base model (a hub id or folder).

    ``kind`` is a class with ``from_pretrained``, which takes the options. Raises ValueError if it
    fails.
    """
    try:
        return kind.from_pretrained(location, subfolder=subfolder, **options)
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise errors of many types
        reason = one_line(error)
        raise ValueError(f"base model {location}: cannot load its {subfolder}: {reason}") from error
