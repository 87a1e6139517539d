"""Discriminators that train together with the decoder, with hinge losses.

One discriminator judges pixels. The other judges the responses of frozen networks, with small
heads. Thanks to the pretrained features it is useful after a few hundred steps (Projected GANs,
Sauer et al. 2021, arXiv 2111.01007). Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957)
keeps both stable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from percov2.training.optimizers import adamw, make_recordable, restore
from percov2.training.stage import Place

__all__ = ["Adversary", "AdversaryConfig", "FeatureDiscriminator", "PixelDiscriminator"]
__all__ += ["with_force"]


@dataclass(frozen=True)
class AdversaryConfig:
    """The settings of the discriminators. ``losses.LossTerms`` has the weights of their losses.

    Raises:
        ValueError: a setting is out of range.
    """

    learning_rate: float = 2e-4  # constant learning rate of AdamW
    pixel_widths: tuple[int, int, int] = (48, 96, 192)  # channels at 1/2, 1/4, 1/8 resolution
    feature_width: int = 64  # channels of the heads on features

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or min(*self.pixel_widths, self.feature_width) < 1:
            raise ValueError(f"learning_rate and widths must be positive: {self}")


def _layers(*sizes: tuple[int, int, int, int]) -> list[nn.Module]:
    """Return one convolution per (inputs, outputs, size, stride), with activations in between."""
    layers: list[nn.Module] = []
    for inputs, outputs, size, stride in sizes:
        padding = size // 2 - (size == 4)
        convolution = nn.Conv2d(inputs, outputs, size, stride, padding=padding)
        layers += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
    return layers[:-1]


class PixelDiscriminator(nn.Module):
    """A discriminator that gives one score per patch of about 60×60 pixels.

    It takes 0.98 GMAC per 256×256 picture at widths (48, 96, 192).
    """

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        half, quarter, eighth = widths
        strided = (3, half, 4, 2), (half, quarter, 4, 2), (quarter, eighth, 4, 2)
        self.body = nn.Sequential(*_layers(*strided, (eighth, eighth, 3, 1), (eighth, 1, 3, 1)))

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Return a list with one map of scores, float [B, 1, H/8, W/8]. High scores mean real."""
        return [self.body(views[0])]


class FeatureDiscriminator(nn.Module):
    """A discriminator that gives a score at every position of frozen networks' responses.

    ``channels`` holds the number of channels of each response. ``width`` is the number of channels
    of the heads.
    """

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(count, affine=False),
                *_layers((count, width, 1, 1), (width, width, 3, 1), (width, 1, 3, 1)),
            )
            for count in channels
        )

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Return one map of scores, float [B, 1, h, w], per response. High scores mean real."""
        return [head(view) for head, view in zip(self.heads, views, strict=True)]


class _FixedForce(torch.autograd.Function):
    """The identity, but it rescales the gradient of each sample to a given root mean square."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, force: Tensor) -> Tensor:
        ctx.save_for_backward(force)
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        size = gradient.float().square().mean().sqrt()
        force = (ctx.saved_tensors[0] / size.clamp_min(1e-20)).view(-1, 1, 1, 1)
        return gradient * force.to(gradient.dtype), None


def with_force(images: Tensor, weight: Tensor, realism: Tensor) -> Tensor:
    """Return the pictures unchanged, but give the gradient of a loss a fixed size.

    For each sample, the root mean square of the gradient becomes ``weight`` · β times that of L1.
    Therefore a discriminator can neither fade nor dominate.

    Args:
        images: float [B, 3, H, W] with gradients.
        weight: a scalar. If it is on the device of the pictures, recorded steps follow its changes.
        realism: β of every sample, float [B].
    """
    return _FixedForce.apply(images, weight * realism / images.numel())


class Adversary:
    """A discriminator with its optimiser and its next training batch.

    It is not a module, because its weights are neither averaged nor exported, and because a run may
    add an adversary later. ``network`` maps a list of views to a list of score maps.
    """

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        self.network = network
        self.optimizer = adamw(network.parameters(), learning_rate, (0.5, 0.9), 0.0)
        self._batch: tuple[list[Tensor], list[Tensor], Tensor, bool] | None = None

    def start_run(self, place: Place) -> None:
        """Move to the device of a run. Call this before ``learn`` and ``load_state_dict``."""
        self.network.to(place.device)
        if place.recorded:
            make_recordable(self.optimizer, place.device)

    def loss(self, fakes: list[Tensor], reals: list[Tensor], realism: Tensor) -> Tensor:
        """Return the generator's hinge loss per sample, float [B]. Keep the batch for ``learn``.

        Args:
            fakes: views of the pictures, with gradients.
            reals: the same views of the photos.
            realism: β of every sample, float [B]. It is the weight of the picture in ``learn``.
        """
        self.network.eval().requires_grad_(False)
        autocast = torch.is_autocast_enabled(fakes[0].device.type)
        self._batch = reals, [view.detach() for view in fakes], realism, autocast
        scores = [-s.float().mean((1, 2, 3)) for s in self.network(fakes)]
        return torch.stack(scores).mean(0)

    def learn(self) -> Tensor | None:
        """Take one step on the last batch. Return the loss, or None if there is no batch."""
        if self._batch is None:
            return None
        reals, fakes, realism, autocast = self._batch
        self._batch = None
        self.network.train().requires_grad_(True)
        share = realism / realism.mean().clamp_min(1e-6)
        losses = []
        with torch.autocast(reals[0].device.type, torch.bfloat16, enabled=autocast):
            both = [torch.cat([x, y.to(x.dtype)]) for x, y in zip(reals, fakes, strict=True)]
            both = [views.contiguous(memory_format=torch.channels_last) for views in both]
            for scores in self.network(both):
                real, fake = scores.float().chunk(2)
                doubt = F.relu(1 + fake).mean((1, 2, 3)) * share
                losses.append(F.relu(1 - real).mean() + doubt.mean())
            loss = torch.stack(losses).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the weights and the optimiser."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all but the learning rate. Raise ValueError if the state has other widths."""
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            what = "the run's discriminator has other widths than the configuration"
            raise ValueError(f"{what}: {error}") from error
        restore(self.optimizer, state["optimizer"])
