"""The backbone "tiny" on torch: the small networks of a model folder, loaded on first use.

Compressing never loads the flow transformer; decompressing never loads the hyper-encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from numpy.typing import NDArray
from torch import Tensor

from percov2.models.backbone import BackboneOptions
from percov2.models.tiny.backbone import draw_noise, window_sides
from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.models.tiny.torch.dial import RealismDial
from percov2.models.tiny.torch.text_encoder import HashedTextEncoder
from percov2.models.torch import flow as flows
from percov2.models.torch.backbone import TorchBackbone
from percov2.models.torch.borders import own_borders
from percov2.models.torch.hyper_encoder import HyperEncoder
from percov2.models.torch.isolation import running
from percov2.models.torch.placement import TORCH_DTYPES
from percov2.models.torch.storage import load_component
from percov2.models.windows import sample, whole_patches

__all__ = ["BatchWarning", "TinyTorchModel"]


_BUCKET = 128
"""Sides of batches are multiples of this many pixels."""
_PIXELS_AT_ONCE = 1 << 23
_MOST_AT_ONCE = 64


class BatchWarning(UserWarning):
    """A device that computes a picture's tokens in dependence on other pictures of a batch."""


def _whole_buckets(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _pictures_at_once(bucket: tuple[int, int]) -> int:
    """Return the number of pictures of a batch, a power of two that bounds the memory."""
    fitting = max(1, _PIXELS_AT_ONCE // (bucket[0] * bucket[1]))
    return min(_MOST_AT_ONCE, 1 << (fitting.bit_length() - 1))


class TinyTorchModel(TorchBackbone):
    """The small networks of a model folder, whose layout is in docs/reference/model-folder.md."""

    def __init__(
        self, folder: Path, device: str = "cpu", options: BackboneOptions | None = None
    ) -> None:
        super().__init__(folder, device)
        self.dtype = (options or BackboneOptions()).dtype or "fp32"
        self._kind = torch.device(device).type

    @property
    def runtime(self) -> str:
        """Return the runtime of the networks, as ``Backbone.runtime``."""
        return f"{super().runtime}, painting in {self.dtype}"

    @cached_property
    @torch.inference_mode(False)  # a token search needs gradients through it
    def autoencoder(self) -> PatchAutoencoder:
        """Return the autoencoder, channels last, which is twice as fast on the CPU."""
        model = load_component(PatchAutoencoder, self.component("autoencoder"), self.device)
        return model.to(memory_format=torch.channels_last)

    @cached_property
    def flow(self) -> SD3Transformer2DModel:
        """Return the widened flow transformer."""
        return load_component(SD3Transformer2DModel, self.component("flow"), self.device)

    @cached_property
    def text_encoder(self) -> HashedTextEncoder:
        """Return the caption's conditioning network."""
        return load_component(HashedTextEncoder, self.component("text_encoder"), self.device)

    @cached_property
    def dial(self) -> RealismDial | None:
        """Return the realism dial; None for a model without one."""
        if self.config.realism is None:
            return None
        return load_component(RealismDial, self.component("dial"), self.device)

    @property
    def patch(self) -> int:
        """Return the side of the flow's patches, in latent positions."""
        return int(self.flow.config["patch_size"])

    def _load_hyper_encoder(self, rate: str) -> HyperEncoder:
        return super()._load_hyper_encoder(rate).to(memory_format=torch.channels_last)

    def hyper_latents(self, images: Tensor, rate: str) -> Iterator[Tensor]:
        """Yield hyper-latents, as ``Backbone.hyper_latents``."""
        self.token_side(images, rate)
        hyper_encoder = self.hyper_encoder(rate)
        for image in images.to(self.device).split(1):
            latents = self.autoencoder.encode(image.contiguous(memory_format=torch.channels_last))
            yield hyper_encoder(latents)

    @property
    def _in_batches(self) -> bool:
        """Whether batches are faster than single pictures, as on GPUs."""
        return str(self.device) != "cpu"

    @cached_property
    def mixes_sizes(self) -> bool:
        """Whether pictures of different sizes share a batch.

        Only on GPUs, where a batch is faster, and only if a trial shows that a picture's tokens do
        not depend on its company there.
        """
        if not self._in_batches:
            return False
        rate, random = self.config.default_rate, np.random.default_rng(0)
        sizes = ((64, 128), (128, 64), (128, 128), (64, 64))
        pictures = [random.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
        together = self._in_bucket(pictures[::-1], rate, (_BUCKET, _BUCKET))[::-1]
        for picture, expected in zip(pictures, together, strict=True):
            (alone,) = self._in_bucket([picture], rate, (_BUCKET, _BUCKET))
            if not np.array_equal(alone, expected):
                warnings.warn(
                    f"on {self.device}, tokens depend on other pictures of a batch, so pictures "
                    "are encoded one at a time",
                    BatchWarning,
                    stacklevel=2,
                )
                return False
        return True

    def encode_pictures(
        self, pictures: Sequence[NDArray[np.uint8]], rate: str
    ) -> list[NDArray[np.int32]]:
        """Return tokens, as ``Backbone.encode_pictures``; on GPUs in batches of mixed sizes."""
        if not self.mixes_sizes:
            return super().encode_pictures(pictures, rate)
        for picture in pictures:
            self.token_side(picture.transpose(2, 0, 1), rate)
        buckets = [
            (_whole_buckets(picture.shape[0]), _whole_buckets(picture.shape[1]))
            for picture in pictures
        ]
        found: dict[int, NDArray[np.int32]] = {}
        for bucket in dict.fromkeys(buckets):
            members = [i for i, one in enumerate(buckets) if one == bucket]
            step = _pictures_at_once(bucket)
            for begin in range(0, len(members), step):
                some = members[begin : begin + step]
                tokens = self._in_bucket([pictures[i] for i in some], rate, bucket)
                found.update(zip(some, tokens, strict=True))
        return [found[i] for i in range(len(pictures))]

    @torch.inference_mode()
    def _in_bucket(
        self, pictures: Sequence[NDArray[np.uint8]], rate: str, bucket: tuple[int, int]
    ) -> list[NDArray[np.int32]]:
        """Encode pictures in a batch whose shape depends on the bucket alone.

        Convolution libraries choose their order of sums by the shape of a batch, so blank pictures
        fill it up.
        """
        count, side = _pictures_at_once(bucket), self.config.rate(rate).token_side
        pinned = self._kind == "cuda"  # the copy to the device does not stop this thread
        pixels = torch.zeros(count, *bucket, 3, dtype=torch.uint8, pin_memory=pinned)
        sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
        for place, picture, (height, width) in zip(pixels, pictures, sizes, strict=False):
            place[:height, :width] = torch.from_numpy(picture)
        sizes += [(0, 0)] * (count - len(pictures))
        with running(self.device):
            placed = pixels.to(self.device, non_blocking=True)
            images = placed.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
            for image, (height, width) in zip(images, sizes, strict=True):
                image[:, height:] = 0
                image[:, :, width:] = 0
            encoder, stride = self.autoencoder, PatchAutoencoder.stride
            with own_borders(encoder.encoder, sizes, stride):
                latents = encoder.encode(images.contiguous(memory_format=torch.channels_last))
            hyper_encoder, quantizer = self.hyper_encoder(rate), self.quantizer(rate)
            small = [(height // stride, width // stride) for height, width in sizes]
            with own_borders(hyper_encoder, small, side // stride):
                hyper_latents = hyper_encoder(latents)
            tokens = quantizer.nearest(quantizer.directions(hyper_latents)).cpu().numpy()
        return [
            tokens[i, : height // side, : width // side]
            for i, (height, width) in enumerate(sizes[: len(pictures)])
        ]

    def z_hat(self, tokens: Tensor, rate: str) -> Tensor:
        """Return the flow's input z_hat [B, C, H/8, W/8] of tokens int [B, h, w].

        Raises ValueError for tokens out of range and an unknown rate.
        """
        ratio = self.config.rate(rate).token_side // PatchAutoencoder.stride
        z_hat = self.quantizer(rate).lookup(tokens.to(self.device))
        return flows.upsample_z_hat(z_hat, tokens.shape[-2] * ratio, tokens.shape[-1] * ratio)

    def paint(
        self,
        tokens: Tensor,
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None,
    ) -> Tensor:
        """Paint images from tokens and captions, as ``reconstruct``.

        If the flow's patches do not divide the latent grid, the last row and column of z_hat are
        repeated, and the picture is cropped.
        """
        half = TORCH_DTYPES[self.dtype]
        with torch.autocast(self._kind, half, enabled=half != torch.float32):
            images = self._paint(tokens, rate, captions, steps, guidance, seed, realism)
        return images.float().clamp(-1, 1)

    def _paint(
        self,
        tokens: Tensor,
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None,
    ) -> Tensor:
        """Return unclamped images, as ``paint``, in the numbers of the networks."""
        z_hat = self.z_hat(tokens, rate)
        height, width = z_hat.shape[-2:]
        z_hat = flows.pad_to_patches(z_hat, self.patch)
        noise, grain = self.draw_noise(height, width, seed)
        realism = self.config.chosen_realism(rate, realism)
        grain = self.config.grain(rate, realism) * grain
        text = self.conditioning(captions, realism)
        empty = self.conditioning([""] * len(tokens), realism)
        guided = guidance != 1.0 and any(captions)
        windows = self.window_sides(rate, height, width)

        def estimate(noisy: Tensor, z: Tensor, t: float) -> Tensor:
            conditional = self._estimate(noisy, z, t, text, windows)
            if not guided:
                return conditional
            unconditional = self._estimate(noisy, z, t, empty, windows)
            return unconditional + guidance * (conditional - unconditional)

        latents = sample(estimate, z_hat, noise.expand(len(tokens), -1, -1, -1), steps)
        return self._decode(latents + grain, height, width)

    def conditioning(self, captions: Sequence[str], realism: float) -> tuple[Tensor, Tensor]:
        """Return the flow's conditioning: a sequence and a pooled vector."""
        sequence, pooled = self.text_encoder(captions)
        if self.dial is not None:
            pooled = pooled + self.dial(torch.full((len(pooled),), realism, device=pooled.device))
        return sequence, pooled

    def draw_noise(self, height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw the starting noise and the decoder's noise, of variance 1, for height × width.

        Both are [16, h, w], height and width rounded up to whole patches of the flow.
        """
        rows, columns = (whole_patches(side, self.patch) for side in (height, width))
        channels = int(self.flow.config["out_channels"])
        noise, grain = torch.from_numpy(draw_noise((channels, rows, columns), seed))
        return noise.to(self.device), grain.to(self.device)

    def window_sides(self, rate: str, height: int, width: int) -> tuple[int, int]:
        """Return the sides of the flow's windows for height × width latents."""
        rows, columns = (whole_patches(side, self.patch) for side in (height, width))
        return window_sides(self.config, rate, (rows, columns), self.patch)

    def paint_once(
        self,
        z_hat: Tensor,
        text: tuple[Tensor, Tensor],
        noise: Tensor,
        grain: Tensor,
        windows: tuple[int, int],
    ) -> Tensor:
        """Return images [B, 3, H, W] after one step without guidance, unclamped, differentiable.

        z_hat is [B, C, H/8, W/8]; noise and grain are those of :meth:`draw_noise`, the latter times
        ``ModelConfig.grain``; windows are those of :meth:`window_sides`.
        """
        height, width = z_hat.shape[-2:]
        z_hat = flows.pad_to_patches(z_hat, self.patch)
        clean = self._estimate(noise.expand(len(z_hat), -1, -1, -1), z_hat, 1.0, text, windows)
        return self._decode(clean + grain, height, width)

    def _estimate(
        self,
        noisy: Tensor,
        z_hat: Tensor,
        t: float,
        text: tuple[Tensor, Tensor],
        windows: tuple[int, int],
    ) -> Tensor:
        """Return estimates of the clean latents from those at time t, window by window."""
        config = self.config

        def window(x: Tensor, cut: Tensor, rows: Tensor) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            picked = (text[0][rows], text[1][rows])
            return flows.estimate_clean(self.flow, x, cut, times, picked, config.prediction)

        return flows.WindowedEstimate(window, windows, config.overlap)(noisy, z_hat)

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return unclamped images of height × width latents; on GPUs in batches."""
        stride = self.autoencoder.stride
        bucket = stride * latents.shape[2], stride * latents.shape[3]
        count = _pictures_at_once(bucket) if self._in_batches else 1
        parts = (x.contiguous(memory_format=torch.channels_last) for x in latents.split(count))
        images = torch.cat([self.autoencoder.decode(x) for x in parts])
        return images[..., : height * stride, : width * stride]
