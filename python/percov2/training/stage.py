"""What a stage of training is to the loop: where it runs, what it draws, what it computes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where a process stands in a run.

    Attributes:
        device: of the stage's weights in this process.
        process: its index.
        processes: how many there are.
        accumulate: forward passes per step.
        seed: of the run.
        recorded: whether steps are recorded (``recording.RecordedSteps``).
    """

    device: torch.device
    process: int = 0
    processes: int = 1
    accumulate: int = 1
    seed: int = 0
    recorded: bool = False


@dataclass(frozen=True)
class Draw:
    """What a step is about.

    Attributes:
        kind: whatever decides which operations it takes.
        tensors: whatever they are applied to, on the device.
    """

    kind: Hashable
    tensors: dict[str, Tensor]


class TrainingStage(nn.Module):
    """One stage of training: networks, data and losses.

    Attributes:
        whole_batches: every process draws (or knows) the whole batch and takes its own part. Then
            the number of processes changes nothing but rounding, also when a run goes on.
            Otherwise each process draws batches of its own.
        recordable: :meth:`compute` and :meth:`after_step` read nothing back from a GPU and keep
            nothing but what lies at one place, so that they may be recorded.
    """

    whole_batches = False
    recordable = False

    def draw(self, generator: np.random.Generator) -> Draw:
        """Draw a batch; with :meth:`compute` it is an alternative to defining ``forward``."""
        raise TypeError(f"{type(self).__name__} must define draw or forward")

    def compute(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the figures of a batch, as ``forward`` returns them."""
        raise TypeError(f"{type(self).__name__} must define compute or forward")

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a batch and return the loss and figures to log.

        Figures are scalars, the same names at every step; NaN where a step has none.
        """
        return self.compute(self.draw(generator))

    def stored_keys(self) -> set[str]:
        """Names of ``state_dict()`` that checkpoints hold (e.g. without frozen networks)."""
        return set(self.state_dict())

    def start_run(self, place: Place) -> None:
        """Called once the weights are on their device, before anything is restored."""

    def start_step(self, step: int, total: int) -> None:
        """Called before every step (e.g. to switch fake quantization on)."""

    def after_step(self) -> None:
        """Called after every optimiser step (e.g. to move the codebook)."""

    def draw_samples(self, folder: Path, step: int) -> None:
        """Called at every checkpoint, in evaluation mode with averaged weights."""

    def side_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the weights (e.g. a discriminator); collective."""
        return {}

    def load_side_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`side_state` returned; {} from a run that had none."""
