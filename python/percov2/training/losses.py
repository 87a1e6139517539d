"""Reconstruction losses of stage 1: L1 and LPIPS with real gradients through the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from percov2.evaluation.perceptual import LPIPS


class ReconstructionLoss(nn.Module):
    """L1 + weight · LPIPS(alex) of decoded images against the photos.

    LPIPS-VGG and DISTS are kept for judging and are never training losses.
    """

    def __init__(self, lpips_weight: float) -> None:
        super().__init__()
        self.lpips_weight = lpips_weight
        self.lpips = LPIPS("alex")

    def forward(self, images: Tensor, references: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts; images and references [B, 3, H, W] in [-1, 1]."""
        l1 = (images.float() - references).abs().mean()
        with torch.no_grad():
            target = self.lpips.features(references)
        lpips = self.lpips.distance(self.lpips.features(images), target).mean()
        loss = l1 + self.lpips_weight * lpips
        return loss, {"l1": l1.detach(), "lpips": lpips.detach()}
