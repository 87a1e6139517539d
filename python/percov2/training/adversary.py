"""A patch discriminator that trains beside the decoder (phase D), with hinge losses.

Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957) keeps it stable. The force on the
decoded picture has a fixed size: however sure of itself the discriminator is, its gradient is
scaled to a given multiple of the L1 loss's, so that it can neither fade nor take over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

REACHES = ("all", "decoder")


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
        widths: channels at 1/2, 1/4 and 1/8 resolution.

    Raises:
        ValueError: settings out of range.
    """

    weight: float = 0.0
    from_step: int = 0
    warmup: int = 1000
    reach: str = "all"
    learning_rate: float = 2e-4
    widths: tuple[int, int, int] = (48, 96, 192)

    def __post_init__(self) -> None:
        if self.reach not in REACHES:
            raise ValueError(f"reach must be one of {REACHES}, not {self.reach!r}")
        if self.weight < 0 or self.from_step < 0 or self.warmup < 0:
            raise ValueError(
                f"weight, from_step and warmup must not be negative: {self.weight}, "
                f"{self.from_step}, {self.warmup}"
            )


class PatchDiscriminator(nn.Module):
    """One score per patch of about 60×60 pixels; 0.98 GMAC per 256×256 picture at (48, 96, 192)."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        half, quarter, eighth = widths

        def layer(inputs: int, outputs: int, size: int, stride: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(inputs, outputs, size, stride, padding=1))

        self.body = nn.Sequential(
            layer(3, half, 4, 2),
            nn.LeakyReLU(0.2),
            layer(half, quarter, 4, 2),
            nn.LeakyReLU(0.2),
            layer(quarter, eighth, 4, 2),
            nn.LeakyReLU(0.2),
            layer(eighth, eighth, 3, 1),
            nn.LeakyReLU(0.2),
            layer(eighth, 1, 3, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores float [B, 1, H/8, W/8] of images [B, 3, H, W] in [-1, 1]; high means real."""
        return self.body(images)


class _FixedForce(torch.autograd.Function):
    """Identity whose gradient is rescaled to a given root-mean-square."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, force: float) -> Tensor:
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
        self.network = PatchDiscriminator(config.widths)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, betas=(0.5, 0.9), weight_decay=0.0
        )
        self._batch: tuple[Tensor, Tensor, bool] | None = None

    def weight(self, step: int) -> float:
        """The weight at a step: 0 before ``from_step``, then rising linearly."""
        done = step - self.config.from_step
        if done < 0:
            return 0.0
        return self.config.weight * min(1.0, (done + 1) / (self.config.warmup + 1))

    def loss(self, rebuilt: Tensor, images: Tensor, step: int) -> Tensor:
        """The generator's hinge loss, its gradient already scaled; keeps the batch for `learn`.

        Args:
            rebuilt: decoded pictures [B, 3, H, W] with gradients.
            images: the photos, same shape, in [-1, 1].
            step: of the training loop.
        """
        self.network.eval().requires_grad_(False)
        autocast = torch.is_autocast_enabled(images.device.type)
        self._batch = images, rebuilt.detach(), autocast
        felt = _FixedForce.apply(rebuilt, self.weight(step) / rebuilt.numel())
        return -self.network(felt).float().mean()

    def learn(self) -> Tensor | None:
        """One step of the discriminator on the last batch; its loss, None without a batch."""
        if self._batch is None:
            return None
        images, rebuilt, autocast = self._batch
        self._batch = None
        self.network.train().requires_grad_(True)
        both = torch.cat([images, rebuilt.to(images.dtype)])
        both = both.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            real, fake = self.network(both).float().chunk(2)
            loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser, for a checkpoint."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
