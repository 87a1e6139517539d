"""Checkpoints of a run: weights, averages, optimiser, and the random state of every process."""

from __future__ import annotations

import os
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from percov2.stored_files import check_regular, one_line
from percov2.training.ranges import MOST_STEPS

__all__ = ["CheckpointWarning", "check_names", "gather_draws", "is_present", "kept", "previous"]
__all__ += ["read", "restore", "restore_draws", "write"]


class CheckpointWarning(UserWarning):
    """A checkpoint that is damaged or missing, so that the one before is used."""


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
    """Return True if there is a checkpoint, or one before it.

    Raises:
        ValueError: a folder has the name of one of them, which could not be written at the end.
    """
    for place in (path, previous(path)):
        if place.is_dir():
            raise ValueError(f"{place} is a folder; remove it or choose another folder for the run")
    return path.is_file() or previous(path).is_file()


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, or the one before with a warning if it is damaged or missing.

    Raises:
        ValueError: there is none, or both are damaged or no checkpoints.

    Warns:
        CheckpointWarning: the one before is used.
    """
    try:
        return _read(path)
    except ValueError as error:
        if not previous(path).is_file():
            raise ValueError(f"{error}; delete it to start the run again") from error
        fault = error
    try:
        state = _read(previous(path))
    except ValueError as error:
        raise ValueError(f"{fault}, and {error}; delete both to start the run again") from error
    message = f"{fault}; the run goes on from the checkpoint before"
    warnings.warn(message, CheckpointWarning, stacklevel=2)
    return state


def _read(path: Path) -> dict[str, Any]:
    check_regular(path)
    try:
        # torch does not compare the checksums of what it reads.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{path} is damaged: wrong checksum of {damaged}")
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error) as error:
        reason = one_line(error)
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of many types; torch's advice is to run the file's code
        text = "it holds more than tensors, numbers and texts"
        raise ValueError(f"{path} is no checkpoint: {text}") from error
    if not _is_checkpoint(state):
        raise ValueError(f"{path} is no checkpoint of a run")
    return cast(dict[str, Any], state)


def _is_checkpoint(state: Any) -> bool:
    """Return True for averages, a step and possibly more; a campaign joins no more than these."""
    if not isinstance(state, dict):
        return False
    step, networks = state.get("step"), (state.get("ema"), state.get("model", {}))
    return (type(step) is int and 0 <= step <= MOST_STEPS) and all(
        isinstance(network, dict) and all(isinstance(value, Tensor) for value in network.values())
        for network in networks
    )


def kept(module: nn.Module, keys: set[str]) -> dict[str, Tensor]:
    """Return the entries of a module's state that belong to ``keys``."""
    return {k: v for k, v in module.state_dict().items() if k in keys}


def restore(module: nn.Module, state: dict[str, Tensor], keys: set[str], path: Path) -> None:
    """Load ``state`` into ``module``. Raise ValueError if names or shapes differ.

    ``keys`` are the expected names, and ``path`` is the checkpoint that messages name.
    """
    check_names(state, keys, path)
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not match the configuration: {one_line(error)}") from error


def check_names(state: dict[str, Tensor], keys: set[str], path: Path) -> None:
    """Raise ValueError unless the names of stored tensors are ``keys``."""
    if set(state) != keys:
        odd = sorted(set(state) ^ keys, key=str)
        raise ValueError(f"{path} contains other networks: {odd[:3]} ({len(odd)} names differ)")


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
