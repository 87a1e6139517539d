"""Checkpoints of a run: weights, averages, optimiser, and the random state of every process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["gather_draws", "kept", "read", "restore", "restore_draws", "write"]


def write(path: Path, state: dict[str, Any]) -> None:
    """Store a checkpoint atomically."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def kept(module: nn.Module, keys: set[str]) -> dict[str, Tensor]:
    """Return the entries of a module's state that belong to ``keys``."""
    return {k: v for k, v in module.state_dict().items() if k in keys}


def restore(module: nn.Module, state: dict[str, Tensor], keys: set[str], path: Path) -> None:
    """Load ``state`` into ``module``. Raise ValueError if names or shapes differ.

    ``keys`` are the expected names, and ``path`` is the checkpoint that messages name.
    """
    if set(state) != keys:
        odd = sorted(set(state) ^ keys)
        raise ValueError(f"{path} contains other networks: {odd[:3]} ({len(odd)} names differ)")
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not match the configuration: {error}") from error


def gather_draws(generator: np.random.Generator) -> list[dict[str, Any]]:
    """Return the random states of all processes, in the order of the processes (collective)."""
    from accelerate.utils import gather_object

    own = {"generator": generator.bit_generator.state, "torch_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda_rng"] = torch.cuda.get_rng_state()
    return gather_object([own])


def restore_draws(
    state: dict[str, Any], generator: np.random.Generator, process: int, processes: int, path: Path
) -> None:
    """Restore the random state of a process.

    Raises ValueError if the run had another number of processes.
    """
    # Older checkpoints hold only the first process's state, so it is stored apart.
    draws = [state, *state.get("other_processes", [])]
    if (count := len(draws)) != processes:
        found = f"{path} is from a run with {count} processes, each with its own batches"
        raise ValueError(f"{found}; resume it with {count} processes, not {processes}")
    own = draws[process]
    generator.bit_generator.state = own["generator"]
    torch.set_rng_state(own["torch_rng"])
    # A run may resume on a machine with or without a GPU.
    if torch.cuda.is_available() and "cuda_rng" in own:
        torch.cuda.set_rng_state(own["cuda_rng"])
