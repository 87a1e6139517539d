"""Where a big backbone's networks live and run, and how those of a base model are loaded."""

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

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """Device and dtype of a base model's networks.

    Attributes:
        device: where they run.
        dtype: of their weights and of what goes through them.
        offload: they wait in CPU memory, and only the one at work is on the device.
    """

    device: str
    dtype: torch.dtype
    offload: bool

    @classmethod
    def of(cls, device: str, options: BackboneOptions) -> Placement:
        """The placement that the options ask for on a device."""
        default = "fp32" if torch.device(device).type == "cpu" else "bf16"
        return cls(device, _DTYPES[options.dtype or default], options.offload)

    def settle(self, network: nn.Module) -> Any:
        """A freshly loaded network at the place where it waits, for inference only."""
        network.eval().requires_grad_(False)
        return network if self.offload else network.to(self.device)

    @contextmanager
    def at_work(self, network: nn.Module) -> Iterator[None]:
        """Inside, the network is on the device."""
        if not self.offload:
            yield
            return
        network.to(self.device)
        try:
            yield
        finally:
            network.to("cpu")


def base_location(folder: Path, base: str) -> str:
    """What ``from_pretrained`` is given for the base model of a folder.

    Args:
        base: a hub id, a folder, or a folder relative to ``folder`` if it starts with a dot.

    Raises:
        ValueError: when it is neither a folder nor could be a hub id.
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


# Networks are loaded when first needed, often inside inference mode; their weights must stay
# ordinary tensors.
@torch.inference_mode(False)
def load_part(kind: Any, location: str, subfolder: str, **options: Any) -> Any:
    """A network, tokenizer or scheduler of a base model.

    Args:
        kind: class with ``from_pretrained``.
        location: hub id or folder of the base model.
        options: for ``from_pretrained``.

    Raises:
        ValueError: when it cannot be loaded.
    """
    try:
        return kind.from_pretrained(location, subfolder=subfolder, **options)
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise whatever they stumble over
        raise ValueError(f"base model {location}: cannot load its {subfolder}: {error}") from error
