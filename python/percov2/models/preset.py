"""Model folders and the networks in them, loaded when they are first needed.

Compressing never loads the flow transformer, decompressing never loads the hyper-encoder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from percov2.models.autoencoder import PatchAutoencoder
from percov2.models.flow import (
    PREDICTIONS,
    WindowedEstimate,
    estimate_clean,
    sample,
    upsample_z_hat,
)
from percov2.models.hyper_encoder import HyperEncoder
from percov2.models.quantizer import VectorQuantizer
from percov2.models.storage import load_component, load_tensor
from percov2.models.text_encoder import HashedTextEncoder

EMBEDDED = Path(__file__).resolve().parent.parent / "pretrained"


@dataclass(frozen=True)
class Rate:
    """A rate point: pixels per token side and codebook size."""

    name: str
    token_side: int
    codebook_size: int


@dataclass(frozen=True)
class ModelConfig:
    """``config.json`` of a model folder.

    Attributes:
        rates: in the order of the rate index in files; never reorder.
        default_schedule: name of the entropy schedule.
        steps, guidance: default sampling.
        prediction: what the flow transformer returns, "velocity" or "sample".
        window, overlap: sampling windows in latent positions.
    """

    name: str
    rates: tuple[Rate, ...]
    default_rate: str
    default_schedule: str = "qlds12"
    steps: int = 1
    guidance: float = 1.0
    prediction: str = "sample"
    window: int = 32
    overlap: int = 8

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``folder/config.json``.

        Raises:
            ValueError: when the file is missing, has unknown keys, or its values do not fit.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} is not a model folder: it has no config.json")
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
            rates = tuple(Rate(**r) for r in values.pop("rates"))
            config = cls(rates=rates, **values)
            config.check()
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        return config

    def check(self) -> None:
        """Raise ValueError for a value of the wrong type or outside its range."""
        for rate in self.rates:
            # The name is also that of a folder in the model folder.
            name = rate.name
            if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
                raise ValueError(f"a rate's name must be that of a folder, not {name!r}")
            side, stride = rate.token_side, PatchAutoencoder.stride
            _check_whole(f"token_side of {rate.name}", side, stride, 64)
            if side % stride:
                raise ValueError(f"token_side of {rate.name} is {side}, no multiple of {stride}")
            _check_whole(f"codebook_size of {rate.name}", rate.codebook_size, 2, 8192)
        if len({rate.name for rate in self.rates}) != len(self.rates):
            raise ValueError("two rates have the same name")
        for field in ("name", "default_schedule"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field} must be a text, not {getattr(self, field)!r}")
        self.rate(self.default_rate)
        _check_whole("steps", self.steps, 1, 1000)
        if type(self.guidance) not in (int, float) or not 0 <= self.guidance <= 100:
            raise ValueError(f"guidance must be a number from 0 to 100, not {self.guidance!r}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, not {self.prediction!r}")
        _check_whole("window", self.window, 1, 4096)
        _check_whole("overlap", self.overlap, 0, self.window - 1)

    def save(self, folder: Path) -> None:
        """Write ``folder/config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def rate(self, name: str) -> Rate:
        """The rate of that name.

        Raises:
            ValueError: naming the rates that exist.
        """
        for rate in self.rates:
            if rate.name == name:
                return rate
        known = ", ".join(r.name for r in self.rates)
        raise ValueError(f"unknown rate {name!r}; model {self.name} has {known}")


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def model_folder(name_or_path: str | Path) -> Path:
    """Folder of an embedded model's name or of a path.

    Raises:
        ValueError: when there is neither; the message lists the embedded models.
    """
    for folder in (Path(name_or_path), EMBEDDED / name_or_path):
        if (folder / "config.json").is_file():
            return folder
    known = sorted(p.parent.name for p in EMBEDDED.glob("*/config.json"))
    raise ValueError(f"no model {str(name_or_path)!r}: give a model folder or one of {known}")


class CodecModel:
    """The float networks of a model folder: images -> tokens, tokens -> images.

    Args:
        folder: see docs/architecture.md for its layout.
        device: torch device of every network.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = Path(folder)
        self.device = device
        self.config = ModelConfig.load(self.folder)
        self._quantizer = lru_cache(None)(self._load_quantizer)
        self._hyper_encoder = lru_cache(None)(self._load_hyper_encoder)

    @cached_property
    def autoencoder(self) -> PatchAutoencoder:
        """The autoencoder, channels last on the CPU (twice as fast there)."""
        model = load_component(PatchAutoencoder, self.folder / "autoencoder", self.device)
        return model.to(memory_format=torch.channels_last)

    @cached_property
    def flow(self) -> SD3Transformer2DModel:
        """The widened flow transformer."""
        return load_component(SD3Transformer2DModel, self.folder / "flow", self.device)

    @cached_property
    def text_encoder(self) -> HashedTextEncoder:
        """The caption's conditioning network."""
        return load_component(HashedTextEncoder, self.folder / "text_encoder", self.device)

    def _load_quantizer(self, rate: str) -> VectorQuantizer:
        folder = self.folder / self.config.rate(rate).name / "quantizer"
        return load_component(VectorQuantizer, folder, self.device)

    def _load_hyper_encoder(self, rate: str) -> HyperEncoder:
        folder = self.folder / self.config.rate(rate).name / "hyper_encoder"
        model = load_component(HyperEncoder, folder, self.device)
        return model.to(memory_format=torch.channels_last)

    def codebook_bytes(self, rate: str) -> bytes:
        """The stored codebook, float32 little-endian, row after row (part of the model id)."""
        path = self.folder / self.config.rate(rate).name / "quantizer" / "model.safetensors"
        return load_tensor(path, "codebook").float().numpy().astype("<f4").tobytes()

    @torch.inference_mode()
    def encode_tokens(self, images: Tensor, rate: str) -> Tensor:
        """Tokens int32 [B, H/s, W/s] of images, s = the rate's token side.

        Images run one at a time: convolution libraries choose their summation order by batch size,
        and an image's tokens must not depend on its neighbours.

        Args:
            images: float [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: when H or W is not a multiple of s, or the rate is unknown.
        """
        side = self.config.rate(rate).token_side
        if images.shape[-1] % side or images.shape[-2] % side:
            raise ValueError(f"image sides must be multiples of {side}: {tuple(images.shape[-2:])}")
        hyper_encoder, quantizer = self._hyper_encoder(rate), self._quantizer(rate)
        tokens = []
        for image in images.to(self.device).split(1):
            latents = self.autoencoder.encode(image.contiguous(memory_format=torch.channels_last))
            tokens.append(quantizer.tokens(hyper_encoder(latents)))
        return torch.cat(tokens)

    @torch.inference_mode()
    def reconstruct(
        self,
        tokens: Tensor,
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
    ) -> Tensor:
        """Paint images from tokens and captions.

        Args:
            tokens: int [B, h, w].
            captions: one per image, "" for none.
            steps: flow evaluations, at least 1.
            guidance: classifier-free guidance on captions; 1 turns it off.
            seed: of the starting noise, the same for every image of the batch.

        Returns:
            Images float [B, 3, h·s, w·s] in [-1, 1].

        Raises:
            ValueError: for tokens out of range, an unknown rate, or steps < 1.
        """
        ratio = self.config.rate(rate).token_side // PatchAutoencoder.stride
        height, width = tokens.shape[-2] * ratio, tokens.shape[-1] * ratio
        z_hat = self._quantizer(rate).lookup(tokens.to(self.device))
        z_hat = upsample_z_hat(z_hat, height, width)
        channels = int(self.flow.config["out_channels"])
        noise = torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed))
        noise = noise.to(self.device).expand(len(tokens), -1, -1, -1)
        text = self.text_encoder(captions)
        empty = self.text_encoder([""] * len(tokens))
        guided = guidance != 1.0 and any(captions)

        def estimate(noisy: Tensor, z: Tensor, t: float) -> Tensor:
            def run(words: tuple[Tensor, Tensor]) -> Tensor:
                def window(x: Tensor, cut: Tensor, rows: Tensor) -> Tensor:
                    times = torch.full((len(x),), t, device=x.device)
                    picked = (words[0][rows], words[1][rows])
                    return estimate_clean(self.flow, x, cut, times, picked, self.config.prediction)

                return WindowedEstimate(window, self.config.window, self.config.overlap)(noisy, z)

            conditional = run(text)
            if not guided:
                return conditional
            unconditional = run(empty)
            return unconditional + guidance * (conditional - unconditional)

        latents = sample(estimate, z_hat, noise, steps)
        decode = self.autoencoder.decode
        parts = [decode(x.contiguous(memory_format=torch.channels_last)) for x in latents.split(1)]
        return torch.cat(parts).clamp(-1, 1)
