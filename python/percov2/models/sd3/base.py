"""The networks of Stable Diffusion 3 that a percov2 folder builds on, loaded on first use."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Protocol

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from percov2.caching import remembered
from percov2.models.backbone import BackboneOptions
from percov2.models.sd3.flow import open_flow
from percov2.models.sd3.text import TextNetworks, load_text_networks
from percov2.models.torch.placement import Placement, base_location, load_part

__all__ = ["SD3Base", "SD3Folder"]


class SD3Base(Protocol):
    """The source of the base model's networks for ``SD3Model``."""

    place: Placement

    def autoencoder(self) -> AutoencoderKL:
        """Return the autoencoder with 16 channels; ValueError if a network cannot be loaded."""
        ...

    def flow(self, rate: str) -> SD3Transformer2DModel:
        """Return the widened transformer of a rate; memory may hold one flow at a time."""
        ...

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Return a new sampler, because samplers have a state."""
        ...

    def text_networks(self) -> TextNetworks:
        """Return the caption's tokenizers and encoders."""
        ...


class SD3Folder(SD3Base):
    """The base model named by a percov2 folder, with the folder's own flow.

    A rate's flow is in ``<rate>/flow``, or in ``flow`` if the rate has none. ``base`` is the hub id
    or folder of the base model in diffusers' layout; ValueError unless it can be one.
    """

    def __init__(self, folder: Path, base: str, device: str, options: BackboneOptions) -> None:
        self.folder, self.options = folder, options
        self.location = base_location(folder, base)
        self.place = Placement.of(device, options)
        self._flow = remembered(self._open_flow, 1)

    @cached_property
    def _autoencoder(self) -> AutoencoderKL:
        form = {"torch_dtype": self.place.dtype, "use_safetensors": True}
        autoencoder = load_part(AutoencoderKL, self.location, "vae", **form)
        if self.options.vae_tiling:
            autoencoder.enable_tiling()
        return self.place.settle(autoencoder)

    def autoencoder(self) -> AutoencoderKL:
        return self._autoencoder

    def flow(self, rate: str) -> SD3Transformer2DModel:
        own = self.folder / rate / "flow"
        return self._flow(own if own.is_dir() else self.folder / "flow")

    def _open_flow(self, folder: Path) -> SD3Transformer2DModel:
        flow = self.place.settle(open_flow(folder, self.location, self.place.dtype))
        if self.options.compile:
            flow.compile()
        return flow

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return load_part(FlowMatchEulerDiscreteScheduler, self.location, "scheduler")

    @cached_property
    def _text_networks(self) -> TextNetworks:
        return load_text_networks(self.location, self.place, self.options.t5)

    def text_networks(self) -> TextNetworks:
        return self._text_networks
