"""The interface between the codec and its networks, and the lookup of a backbone by name.

A backbone turns images into tokens and tokens into images; it knows no entropy models or files. Its
module is imported when it is opened, and its networks load on first use.
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

__all__ = ["DTYPES", "Backbone", "BackboneOptions", "open_backbone"]


_HOME = {
    "tiny": ("tiny.backbone", "CodecModel"),
    "sd3": ("sd3.backbone", "SD3Model"),
    "perco": ("perco.backbone", "PerCoModel"),
}
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class BackboneOptions:
    """Options of a large backbone. They never change a file's meaning; "tiny" accepts none.

    Attributes:
        dtype: dtype of the base model's networks, "fp32", "bf16" or "fp16"; None for "fp32" on the
            CPU and "bf16" elsewhere.
        offload: keep networks in CPU memory and move each to the device only while it runs.
        vae_tiling: run the base model's autoencoder in tiles, to bound its memory.
        compile: compile the flow network with ``torch.compile``; this slows the first picture.
        t5: use SD3's third and largest text encoder; False replaces its embeddings with zeros.

    Raises:
        ValueError: an unknown dtype.
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
        """Return the stored codebook, float32 little-endian, row after row, for the model id."""
        ...

    def encode_tokens(self, images: Tensor, rate: str) -> Tensor:
        """Return tokens int32 [B, H/s, W/s] of images, s = the rate's token side.

        Args:
            images: float [B, 3, H, W] in [-1, 1]; a batch never changes an image's tokens.

        Raises:
            ValueError: H or W is not a multiple of s, or an unknown rate.
        """
        ...

    def directions(self, images: Tensor, rate: str) -> Tensor:
        """Return the unit vectors before quantization, as ``TokenMaker.directions``."""
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
        """Return images float [B, 3, h·s, w·s] in [-1, 1] from tokens int [B, h, w] and captions.

        Args:
            captions: one per image, "" for none.
            steps: evaluations of the flow, at least 1.
            guidance: classifier-free guidance on captions; 1 turns it off.
            seed: seed of the starting noise, which all images of the batch share.
            realism: 0 (faithful) to 1 (realistic) for models with a dial; None for the rate's
                default.

        Raises:
            ValueError: tokens out of range, an unknown rate, steps < 1, realism outside 0 to 1, or
                any realism for a model without a dial.
        """
        ...


def open_backbone(
    name_or_path: str | Path, device: str = "cpu", options: BackboneOptions | None = None
) -> Backbone:
    """Open a model by name; networks load on first use.

    Args:
        name_or_path: an embedded model ("tiny"), a model folder or a saved pipeline. ``KIND:PATH``
            ("sd3:PATH", "perco:PATH") requires a kind of backbone; its PATH may also be a hub id
            ("owner/name"), which is downloaded.
        device: torch device.
        options: backbone options; None for the defaults.

    Raises:
        ValueError: no such model or device, another kind of backbone, or options that the backbone
            does not take.
    """
    device = _checked_device(device)
    folder, config = find_model(name_or_path)
    module, name = _HOME[config.backbone]
    kind_of_model = getattr(importlib.import_module(f"percov2.models.{module}"), name)
    return kind_of_model(folder, device, options or BackboneOptions())


def _checked_device(device: str) -> str:
    """Return the device, "cuda" with the number of the current GPU, which may change later.

    Raises ValueError for a missing device.
    """
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not available on this machine; use cpu")
    if place.type == "cuda" and place.index is None:
        return f"cuda:{torch.cuda.current_device()}"
    return device
