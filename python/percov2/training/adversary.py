"""A discriminator of patches that trains beside the decoder (phase D), with hinge losses.

It judges pixels through a network of its own, or AlexNet's responses through small heads: features
that somebody else learnt make a discriminator useful after a few hundred steps (Projected GANs,
Sauer et al. 2021, arXiv 2111.01007). Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957)
keeps both stable. The force on the decoded picture has a fixed size: however sure of itself the
discriminator is, its gradient is scaled to a given multiple of the L1 loss's, so that it can
neither fade nor take over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from percov2.models.perceptual import LPIPS
from percov2.training.losses import randomly_shifted
from percov2.training.optimizers import adamw, make_recordable, restore
from percov2.training.stage import Place

REACHES = ("all", "decoder")
NETWORKS = ("pixels", "features")


@dataclass(frozen=True)
class AdversaryConfig:
    """Settings of the adversarial loss.

    Attributes:
        weight: root-mean-square of its gradient at the decoded picture, as a multiple of that of
            the mean absolute error; 0 means that there is no discriminator.
        from_step: step from which the discriminator learns and is felt.
        warmup: steps over which the weight grows from 0, counted from ``from_step``.
        reach: "all" (decoder, flow, hyper-encoder, text encoder) or "decoder" (the decoder alone;
            costs a second pass of it).
        learning_rate: AdamW's, constant.
        network: "pixels" or "features" (of AlexNet).
        widths: channels at 1/2, 1/4 and 1/8 resolution of the network of pixels; the heads on
            features have the middle one.

    Raises:
        ValueError: settings out of range.
    """

    weight: float = 0.0
    from_step: int = 0
    warmup: int = 1000
    reach: str = "all"
    learning_rate: float = 2e-4
    network: str = "pixels"
    widths: tuple[int, int, int] = (48, 96, 192)

    def __post_init__(self) -> None:
        if self.reach not in REACHES:
            raise ValueError(f"reach must be one of {REACHES}, not {self.reach!r}")
        if self.network not in NETWORKS:
            raise ValueError(f"network must be one of {NETWORKS}, not {self.network!r}")
        if self.weight < 0 or self.from_step < 0 or self.warmup < 0:
            raise ValueError(
                f"weight, from_step and warmup must not be negative: {self.weight}, "
                f"{self.from_step}, {self.warmup}"
            )


def _layer(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv2d(inputs, outputs, size, stride, padding=size // 2 - (size == 4)))


class PatchDiscriminator(nn.Module):
    """One score per patch of about 60×60 pixels; 0.98 GMAC per 256×256 picture at (48, 96, 192)."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        half, quarter, eighth = widths
        self.body = nn.Sequential(
            _layer(3, half, 4, 2),
            nn.LeakyReLU(0.2),
            _layer(half, quarter, 4, 2),
            nn.LeakyReLU(0.2),
            _layer(quarter, eighth, 4, 2),
            nn.LeakyReLU(0.2),
            _layer(eighth, eighth, 3),
            nn.LeakyReLU(0.2),
            _layer(eighth, 1, 3),
        )

    def view(self, images: Tensor) -> list[Tensor]:
        """What it sees of images [B, 3, H, W] in [-1, 1]: themselves."""
        return [images]

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Scores, one map float [B, 1, H/8, W/8]; high means real."""
        return [self.body(views[0])]


class FeatureDiscriminator(nn.Module):
    """Scores at every place of AlexNet's five slices.

    Per 256×256 picture the heads take 0.2 GMAC at width 64, AlexNet 0.8.

    AlexNet is no part of its weights. Which rows and columns AlexNet's strides meet is drawn anew
    for every batch, as in the reconstruction loss.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self._alexnet = (LPIPS("alex"),)  # in a tuple: neither trained nor stored
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels, affine=False),
                _layer(channels, width, 1),
                nn.LeakyReLU(0.2),
                _layer(width, width, 3),
                nn.LeakyReLU(0.2),
                _layer(width, 1, 3),
            )
            for channels in (64, 192, 384, 256, 256)
        )

    def _apply(self, fn: Any, recurse: bool = True) -> FeatureDiscriminator:
        self._alexnet[0]._apply(fn, recurse)  # no submodule, but it moves along
        return super()._apply(fn, recurse)

    def view(self, images: Tensor) -> list[Tensor]:
        """What it sees of images [B, 3, H, W] in [-1, 1]: responses of the five slices."""
        return self._alexnet[0].responses(*randomly_shifted(images))

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Scores, one map float [B, 1, h, w] per slice; high means real."""
        return [head(view) for head, view in zip(self.heads, views, strict=True)]


class _FixedForce(torch.autograd.Function):
    """Identity whose gradient is rescaled to a given root-mean-square."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, force: float | Tensor) -> Tensor:
        ctx.force = force
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        size = gradient.float().square().mean().sqrt()
        return gradient * (ctx.force / size.clamp_min(1e-20)).to(gradient.dtype), None


class Adversary:
    """The discriminator, its optimiser and the batch that it will learn from.

    No module on purpose: its weights belong neither to the averaged weights nor to an export, and
    a run may get one after it has started.
    """

    def __init__(self, config: AdversaryConfig) -> None:
        self.config = config
        self.network: PatchDiscriminator | FeatureDiscriminator
        if config.network == "pixels":
            self.network = PatchDiscriminator(config.widths)
        else:
            self.network = FeatureDiscriminator(config.widths[1])
        self.optimizer = adamw(self.network.parameters(), config.learning_rate, (0.5, 0.9), 0.0)
        self._batch: tuple[Tensor, list[Tensor], bool] | None = None

    def start_run(self, place: Place) -> None:
        """Move to where a run takes place, before anything is learnt or restored."""
        self.network.to(place.device)
        if place.recorded:
            make_recordable(self.optimizer, place.device)

    def weight(self, step: int) -> float:
        """The weight at a step: 0 before ``from_step``, then rising linearly."""
        done = step - self.config.from_step
        if done < 0:
            return 0.0
        return self.config.weight * min(1.0, (done + 1) / (self.config.warmup + 1))

    def loss(self, rebuilt: Tensor, images: Tensor, weight: float | Tensor) -> Tensor:
        """The generator's hinge loss, its gradient already scaled; keeps the batch for `learn`.

        Args:
            rebuilt: decoded pictures [B, 3, H, W] with gradients.
            images: the photos, same shape, in [-1, 1].
            weight: as :meth:`weight` says, times a factor of the rate; a scalar on their device
                where recorded steps shall follow it.
        """
        self.network.eval().requires_grad_(False)
        felt = _FixedForce.apply(rebuilt, weight / rebuilt.numel())
        views = self.network.view(felt)
        autocast = torch.is_autocast_enabled(images.device.type)
        self._batch = images, [view.detach() for view in views], autocast
        return -torch.stack([scores.float().mean() for scores in self.network(views)]).mean()

    def learn(self) -> Tensor | None:
        """One step of the discriminator on the last batch; its loss, None without a batch."""
        if self._batch is None:
            return None
        images, fakes, autocast = self._batch
        self._batch = None
        self.network.train().requires_grad_(True)
        losses = []
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                reals = self.network.view(images)
            both = [
                torch.cat([x, y.to(x.dtype)]).contiguous(memory_format=torch.channels_last)
                for x, y in zip(reals, fakes, strict=True)
            ]
            for scores in self.network(both):
                real, fake = scores.float().chunk(2)
                losses.append(F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            loss = torch.stack(losses).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser, for a checkpoint."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the learning rate stays the configured one.

        Raises:
            ValueError: a discriminator of another network or other widths.
        """
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise ValueError(
                f"the run's discriminator is none of network {self.config.network!r} with widths "
                f"{self.config.widths}: {error}"
            ) from error
        restore(self.optimizer, state["optimizer"])
