"""What a codec needs of its networks, and how a model's name becomes a backbone.

A backbone turns images into tokens and tokens into images; entropy models and files are no concern
of it. Its module is imported when it is opened, and its networks load when they are first needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from percov2.models.config import ModelConfig, find_model
from percov2.models.quantizer import VectorQuantizer

_HOME = {
    "tiny": ("tiny.backbone", "CodecModel"),
    "sd3": ("sd3.backbone", "SD3Model"),
    "perco": ("perco.backbone", "PerCoModel"),
}
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class BackboneOptions:
    """How a big backbone runs; none of it changes a file's meaning, and "tiny" takes none.

    Attributes:
        dtype: of the base model's networks, "fp32", "bf16" or "fp16"; None: "fp32" on the CPU,
            "bf16" elsewhere.
        offload: keep networks in CPU memory and move each to the device only while it runs.
        vae_tiling: run the base model's autoencoder in tiles, to bound its memory.
        compile: compile the flow network with ``torch.compile`` (slow first picture).
        t5: use SD3's third and by far largest text encoder; its part of a caption is zeros
            without.

    Raises:
        ValueError: for another dtype.
    """

    dtype: str | None = None
    offload: bool = False
    vae_tiling: bool = False
    compile: bool = False
    t5: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {DTYPES}, not {self.dtype!r}")


class Backbone(Protocol):
    """The float networks of a model folder: images -> tokens, tokens -> images."""

    folder: Path
    device: str
    config: ModelConfig
    quantizer: Callable[[str], VectorQuantizer]

    def codebook_bytes(self, rate: str) -> bytes:
        """The stored codebook, float32 little-endian, row after row (part of the model id)."""
        ...

    def encode_tokens(self, images: Tensor, rate: str) -> Tensor:
        """Tokens int32 [B, H/s, W/s] of images, s = the rate's token side.

        Args:
            images: float [B, 3, H, W] in [-1, 1]; a batch never changes an image's tokens.

        Raises:
            ValueError: when H or W is not a multiple of s, or the rate is unknown.
        """
        ...

    def directions(self, images: Tensor, rate: str) -> Tensor:
        """What tokens are the nearest codes of: see ``TokenMaker.directions``."""
        ...

    def reconstruct(
        self,
        tokens: Tensor,
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None = None,
    ) -> Tensor:
        """Images float [B, 3, h·s, w·s] in [-1, 1] from tokens int [B, h, w] and captions.

        Args:
            captions: one per image, "" for none.
            steps: evaluations of the flow, at least 1.
            guidance: classifier-free guidance on captions; 1 turns it off.
            seed: of the starting noise, the same for every image of the batch.
            realism: 0 (faithful) to 1 (realistic) for models with a dial; the rate's default if
                None.

        Raises:
            ValueError: for tokens out of range, an unknown rate, steps < 1, or realism outside 0
                to 1 or for a model without a dial.
        """
        ...


def open_backbone(
    name_or_path: str | Path, device: str = "cpu", options: BackboneOptions | None = None
) -> Backbone:
    """Open a model by name; networks load when first needed.

    Args:
        name_or_path: an embedded model ("tiny"), a model folder, a saved pipeline, or ``KIND:PATH``
            with the kind of backbone that it must have ("sd3:PATH", "perco:PATH"); after a kind,
            PATH may also be a hub id ("owner/name"), which is downloaded.
        device: torch device.
        options: see there; defaults if None.

    Raises:
        ValueError: no such model or device, another kind of backbone, or unfit options.
    """
    device = _checked_device(device)
    folder, config = find_model(name_or_path)
    module, name = _HOME[config.backbone]
    kind_of_model = getattr(importlib.import_module(f"percov2.models.{module}"), name)
    return kind_of_model(folder, device, options or BackboneOptions())


def _checked_device(device: str) -> str:
    """The device, "cuda" with the number of the current card: another may be current later.

    Raises ValueError unless there is such a device.
    """
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; use cpu or cuda")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not available on this machine; use cpu")
    if place.type == "cuda" and place.index is None:
        return f"cuda:{torch.cuda.current_device()}"
    return device
