"""Interface between the training loop and a stage."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Draw", "Place", "TrainingStage"]


@dataclass(frozen=True)
class Place:
    """Facts of a process in a run.

    Attributes:
        device: device of the stage's weights in this process.
        process: index of this process.
        processes: number of processes.
        accumulate: forward passes per step.
        seed: seed of the run.
        recorded: True if steps are recorded (``recording.RecordedSteps``).
    """

    device: torch.device
    process: int = 0
    processes: int = 1
    accumulate: int = 1
    seed: int = 0
    recorded: bool = False


@dataclass(frozen=True)
class Draw:
    """Input of a step.

    Attributes:
        kind: everything that decides the operations of the step.
        tensors: operands on the device.
    """

    kind: Hashable
    tensors: dict[str, Tensor]


class TrainingStage(nn.Module):
    """Base of a training stage: networks, data and losses.

    Attributes:
        whole_batches: True if every process draws the whole batch and takes its own part. Then the
            number of processes affects only rounding, and may change when a run resumes.
        recordable: True if :meth:`compute` and :meth:`after_step` may be recorded: they read
            nothing back from a GPU, and the state that they keep has a fixed address.
    """

    whole_batches = False
    recordable = False

    def draw(self, generator: np.random.Generator) -> Draw:
        """Draw a batch for :meth:`compute`. A stage may define ``forward`` instead."""
        raise TypeError(f"{type(self).__name__} must define draw or forward")

    def compute(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the figures of a batch."""
        raise TypeError(f"{type(self).__name__} must define compute or forward")

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a batch and return the loss and figures to log.

        Figures are scalars with the same names at every step; a missing one is NaN.
        """
        return self.compute(self.draw(generator))

    def stored_keys(self) -> set[str]:
        """Return the keys of ``state_dict()`` for checkpoints (e.g. without frozen networks)."""
        return set(self.state_dict())

    def start_run(self, place: Place) -> None:
        """Prepare a run, after the weights moved to their device and before a restore."""

    def start_step(self, step: int, total: int) -> None:
        """Prepare a step (e.g. switch fake quantization on)."""

    def after_step(self) -> None:
        """Finish an optimiser step (e.g. move the codebook)."""

    def draw_samples(self, folder: Path, step: int) -> None:
        """Write samples at a checkpoint, in evaluation mode with averaged weights."""

    def side_state(self) -> dict[str, Any]:
        """Return further state for a checkpoint (e.g. of a discriminator); collective."""
        return {}

    def load_side_state(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`side_state`, or {} from a run without one."""
