"""What the tests of evaluation share: features of no cost, and what is not installed."""

from __future__ import annotations

import os

import pytest
import torch


class Means(torch.nn.Module):
    """Three features: the mean of each colour."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3)) / 64


def absent(reason: str) -> None:
    """Skip a test for lack of weights or packages; where CI is set they must be there."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
