"""The base of all backbones, between the codec and its networks, and their lookup by name.

A backbone turns images into tokens and tokens into images; it knows no entropy models or files. Its
module is imported when it is opened, and its networks load on first use.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from percov2.models.config import ModelConfig, find_model
from percov2.models.hyper_encoder import HyperEncoder, load_hyper_encoder
from percov2.models.quantizer import VectorQuantizer, load_quantizer, stored_codebook

__all__ = ["DTYPES", "Backbone", "BackboneOptions", "open_backbone"]

_HOME = {"tiny": "CodecModel", "sd3": "SD3Model", "perco": "PerCoModel"}
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


class Backbone(ABC):
    """The float networks of a model folder: images -> tokens, tokens -> images.

    ``config`` is the folder's ``config.json``. ``quantizer`` and ``hyper_encoder`` return the
    network of a rate by name, loaded once. Raises ValueError for a folder that is no model.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = Path(folder), device
        self.config = ModelConfig.load(self.folder)
        self.quantizer = lru_cache(None)(self._load_quantizer)
        self.hyper_encoder = lru_cache(None)(self._load_hyper_encoder)

    def _load_quantizer(self, rate: str) -> VectorQuantizer:
        point = self.config.rate(rate)
        return load_quantizer(self.folder / point.name / "quantizer", point, self.device)

    def _load_hyper_encoder(self, rate: str) -> HyperEncoder:
        point = self.config.rate(rate)
        return load_hyper_encoder(self.folder / point.name / "hyper_encoder", point, self.device)

    def codebook_bytes(self, rate: str) -> bytes:
        """Return the stored codebook, float32 little-endian, row after row, for the model id."""
        return stored_codebook(self.folder / self.config.rate(rate).name / "quantizer")

    def _token_side(self, images: Tensor, rate: str) -> int:
        """Return a rate's token side; ValueError unless it divides the sides of images."""
        side = self.config.rate(rate).token_side
        if images.shape[-1] % side or images.shape[-2] % side:
            raise ValueError(
                f"picture sides must be multiples of {side}: {tuple(images.shape[-2:])}"
            )
        return side

    @abstractmethod
    def hyper_latents(self, images: Tensor, rate: str) -> Iterator[Tensor]:
        """Yield hyper-latents [1, M, H/s, W/s] of one image after the other.

        Images never share a batch: convolution libraries choose their summation order by batch
        size, and an image's tokens must not depend on its neighbours. Arguments and errors as for
        ``encode_tokens``.
        """

    @torch.inference_mode()
    def directions(self, images: Tensor, rate: str) -> Tensor:
        """Return the unit vectors before quantization, float32 [B, H/s, W/s, D].

        Arguments and errors as for ``encode_tokens``.
        """
        quantizer = self.quantizer(rate)
        return torch.cat([quantizer.directions(z) for z in self.hyper_latents(images, rate)])

    @torch.inference_mode()
    def encode_tokens(self, images: Tensor, rate: str) -> Tensor:
        """Return tokens int32 [B, H/s, W/s] of images, s = the rate's token side.

        Images are float [B, 3, H, W] in [-1, 1]; a batch never changes an image's tokens. Raises
        ValueError if H or W is not a multiple of s, and for an unknown rate.
        """
        return self.quantizer(rate).nearest(self.directions(images, rate))

    @abstractmethod
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


def open_backbone(
    name_or_path: str | Path, device: str = "cpu", options: BackboneOptions | None = None
) -> Backbone:
    """Open a model by name; networks load on first use.

    Args:
        name_or_path: an embedded model ("tiny"), a model folder or a saved pipeline. ``KIND:PATH``
            ("sd3:PATH", "perco:PATH") requires a kind of backbone; its PATH may also be a hub id
            ("owner/name"), which is downloaded.
        device: torch device; "cuda" is the card that is current now.
        options: backbone options; None for the defaults.

    Raises:
        ValueError: no such model or device, another kind of backbone, or options that the backbone
            does not take.
    """
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not available on this machine; use cpu")
    if place.type == "cuda" and place.index is None:
        device = f"cuda:{torch.cuda.current_device()}"
    folder, config = find_model(name_or_path)
    module = importlib.import_module(f"percov2.models.{config.backbone}.backbone")
    return getattr(module, _HOME[config.backbone])(folder, device, options or BackboneOptions())
