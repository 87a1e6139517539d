"""Checkpoints of a run: weights, averages, optimiser, and the random state of every process."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["gather_draws", "is_present", "kept", "previous", "read", "restore", "restore_draws"]
__all__ += ["write"]


_PARTS = ("ema", "step")
"""What every checkpoint contains; one joined from a campaign's pieces contains no more."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Store a checkpoint and keep the one before as ``PATH.previous``.

    The data reaches the disk before the names change, so that a crash leaves at least one of them
    whole.
    """
    part = path.with_suffix(".part")
    with open(part, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    if path.is_file():
        os.replace(path, previous(path))
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def previous(path: Path) -> Path:
    """Return the name of the checkpoint before the one at ``path``."""
    return path.with_name(path.name + ".previous")


def is_present(path: Path) -> bool:
    """Return True if there is a checkpoint, or one before it."""
    return path.is_file() or previous(path).is_file()


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, or the one before with a warning if it is damaged or missing.

    Raises:
        ValueError: there is none, or both are damaged or no checkpoints.
    """
    try:
        return _read(path)
    except ValueError as error:
        if not previous(path).is_file():
            raise
        state = _read(previous(path))
        warnings.warn(f"{error}; the run goes on from the checkpoint before", stacklevel=2)
        return state


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no regular file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises errors of many types for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged or no checkpoint ({reason}); delete it to start the run again"
        ) from error
    if not isinstance(state, dict) or not set(_PARTS) <= set(state):
        raise ValueError(f"{path} is no checkpoint of a run; delete it to start the run again")
    return state


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
