"""The networks of Stable Diffusion 3 that a percov2 folder builds on, loaded when first needed."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from percov2.models.backbone import BackboneOptions
from percov2.models.placement import Placement, base_location, load_part
from percov2.models.sd3.flow import open_flow
from percov2.models.sd3.text import TextNetworks, load_text_networks


class SD3Base(Protocol):
    """Where ``SD3Model`` has its base model's networks from."""

    place: Placement

    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder, 16 channels."""
        ...

    def flow(self, rate: str) -> SD3Transformer2DModel:
        """The widened transformer of a rate."""
        ...

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The sampler."""
        ...

    def text_networks(self) -> TextNetworks:
        """The caption's tokenizers and encoders."""
        ...


class SD3Folder:
    """The base model that a percov2 folder names, with the folder's own flow.

    Args:
        folder: of the percov2 model. A rate's flow is in ``<rate>/flow`` if it has one of its own,
            else in ``flow``.
        base: hub id or folder of the base model in diffusers' layout.
        device: torch device.
        options: see there.

    Raises:
        ValueError: when ``base`` can be neither.
    """

    def __init__(self, folder: Path, base: str, device: str, options: BackboneOptions) -> None:
        self.folder, self.options = folder, options
        self.location = base_location(folder, base)
        self.place = Placement.of(device, options)
        self._flow = lru_cache(1)(self._open_flow)

    @cached_property
    def _autoencoder(self) -> AutoencoderKL:
        autoencoder = load_part(
            AutoencoderKL, self.location, "vae", torch_dtype=self.place.dtype, use_safetensors=True
        )
        if self.options.vae_tiling:
            autoencoder.enable_tiling()
        return self.place.settle(autoencoder)

    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder; ValueError when it cannot be loaded, as for all others."""
        return self._autoencoder

    def flow(self, rate: str) -> SD3Transformer2DModel:
        """The widened transformer; of flows of unlike rates one is kept."""
        own = self.folder / rate / "flow"
        return self._flow(own if own.is_dir() else self.folder / "flow")

    def _open_flow(self, folder: Path) -> SD3Transformer2DModel:
        flow = self.place.settle(open_flow(folder, self.location, self.place.dtype))
        if self.options.compile:
            flow.compile()
        return flow

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """A new sampler: it has a state."""
        return load_part(FlowMatchEulerDiscreteScheduler, self.location, "scheduler")

    @cached_property
    def _text_networks(self) -> TextNetworks:
        return load_text_networks(self.location, self.place, self.options.t5)

    def text_networks(self) -> TextNetworks:
        """The caption's tokenizers and encoders, T5 as the options say."""
        return self._text_networks
