"""Checkpoints of a run: weights, averages, optimiser, and what every process would draw next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def write(path: Path, state: dict[str, Any]) -> None:
    """Store a checkpoint; an interrupted call leaves the one before."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def read(path: Path) -> dict[str, Any]:
    """A stored checkpoint, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def kept(module: nn.Module, keys: set[str]) -> dict[str, Tensor]:
    """The part of a module's state that a checkpoint holds."""
    return {k: v for k, v in module.state_dict().items() if k in keys}


def restore(module: nn.Module, state: dict[str, Tensor], keys: set[str], path: Path) -> None:
    """Put ``state`` into ``module``.

    Raises:
        ValueError: when it is not just what ``keys`` names, or of other shapes.
    """
    if set(state) != keys:
        odd = sorted(set(state) ^ keys)
        raise ValueError(f"{path} is of a run with other networks: {odd[:3]} ({len(odd)} differ)")
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the configuration: {error}") from error


def gather_draws(generator: np.random.Generator) -> list[dict[str, Any]]:
    """What every process will draw next, in the order of the processes (collective)."""
    from accelerate.utils import gather_object

    own: dict[str, Any] = {
        "generator": generator.bit_generator.state,
        "torch_rng": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        own["cuda_rng"] = torch.cuda.get_rng_state()
    return gather_object([own])


def restore_draws(
    state: dict[str, Any], generator: np.random.Generator, process: int, processes: int, path: Path
) -> None:
    """Set a process's random generators to those of a checkpoint.

    Raises:
        ValueError: when the run was made by another number of processes.
    """
    # The first process's come by themselves: all that the checkpoints of older versions hold.
    draws = [state, *state.get("other_processes", [])]
    if len(draws) != processes:
        raise ValueError(
            f"{path} is of a run by {len(draws)} processes, which draw {len(draws)} sequences of "
            f"batches; go on with as many, not {processes}"
        )
    generator.bit_generator.state = draws[process]["generator"]
    torch.set_rng_state(draws[process]["torch_rng"])
    # A run may go on where there is no GPU, or on one after it began without.
    if torch.cuda.is_available() and "cuda_rng" in draws[process]:
        torch.cuda.set_rng_state(draws[process]["cuda_rng"])
