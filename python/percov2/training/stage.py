"""The interface between the training loop and a stage."""

from __future__ import annotations

import csv
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from percov2.stored_files import read_regular

_MOST_BYTES = 1 << 30
"""Largest log that is read."""

__all__ = ["ALONE", "Draw", "Figures", "Place", "TrainingStage", "append_row", "keep_rows"]

Figures = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """The place of a process in a run."""

    device: torch.device  # device of the stage's weights in this process
    process: int = 0  # index of this process
    processes: int = 1
    accumulate: int = 1  # forward passes per step
    seed: int = 0  # seed of the run
    recorded: bool = False  # True if steps are recorded (``recording.RecordedSteps``)


ALONE = Place(torch.device("cpu"))
"""The place of a stage that is not part of a run."""


@dataclass(frozen=True)
class Draw:
    """The input of a step.

    ``kind`` holds everything that decides which operations run. ``tensors`` are their operands, on
    the device.
    """

    kind: Hashable
    tensors: dict[str, Tensor]


class TrainingStage(nn.Module):
    """The base class of training stages. A stage has networks, data and losses.

    Attributes:
        whole_batches: True if every process draws the whole batch and takes its own part. Then the
            number of processes affects only rounding, and may change when a run resumes.
        recordable: True if :meth:`compute` and :meth:`after_step` may be recorded. They must not
            read anything back from a GPU, and the state that they keep must have fixed addresses.
        frozen_parts: prefixes of the keys of ``state_dict()`` that checkpoints leave out.
        tables: names of the CSV files that :meth:`draw_samples` appends to. When a run resumes,
            their rows after its checkpoint are removed, as those of log.csv.
    """

    whole_batches = False
    recordable = False
    frozen_parts: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    place = ALONE
    step = 0

    def draw(self, generator: np.random.Generator) -> Draw:
        """Draw a batch for :meth:`compute`. A stage may define ``forward`` instead."""
        raise TypeError(f"{type(self).__name__} must define draw or forward")

    def compute(self, draw: Draw) -> tuple[Tensor, Figures]:
        """Return the loss and the figures of a batch."""
        raise TypeError(f"{type(self).__name__} must define compute or forward")

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, Figures]:
        """Draw a batch. Return its loss and the figures to log.

        Figures are scalars, and every step has the same names. A missing figure is NaN.
        """
        return self.compute(self.draw(generator))

    def stored_keys(self) -> set[str]:
        """Return the keys of ``state_dict()`` that checkpoints store."""
        return {key for key in self.state_dict() if not key.startswith(self.frozen_parts)}

    def start_run(self, place: Place) -> None:
        """Prepare a run. The weights are on their device, and nothing has been restored yet."""
        self.place = place

    def start_step(self, step: int, total: int) -> None:
        """Prepare a step (e.g. switch fake quantization on)."""
        self.step = step

    def after_step(self) -> None:
        """Finish an optimiser step (e.g. move the codebook)."""

    def draw_samples(self, folder: Path, step: int) -> None:
        """Write samples at a checkpoint, in evaluation mode with averaged weights."""

    def side_state(self) -> dict[str, Any]:
        """Return further state for a checkpoint, e.g. of a discriminator (collective)."""
        return {}

    def load_side_state(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`side_state`. It is {} if the run stored none."""


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file. The first line of the file holds the names of the columns."""
    with open(path, "a", newline="") as log:
        writer = csv.DictWriter(log, row)
        if log.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def keep_rows(path: Path, step: int) -> None:
    """Remove the rows of steps after ``step`` from a CSV file, which is made if it is missing.

    A killed run has logged steps after its last checkpoint, and repeats them. Rows that repeat
    earlier steps and a last row without its end are removed, too.

    Raises:
        ValueError: something other than a file has the name.
    """
    lines = []
    if path.exists():
        text = read_regular(path, _MOST_BYTES).decode("utf-8", "replace")
        lines = text.splitlines(keepends=True)
    kept, last = lines[:1], -1
    for line in lines[1:]:
        number = line.partition(",")[0]
        if line.endswith("\n") and number.isdecimal() and last < int(number) <= step:
            kept.append(line)
            last = int(number)
    if lines != kept or not lines:
        part = path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(path)
