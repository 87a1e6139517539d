"""The integer transformer on any device of torch.

``executor`` runs the program in torch, and all other forms are tested against it.
``triton_executor`` runs the program in Triton kernels on GPUs.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy import int_transformer
from percov2.entropy.int_transformer import TRIAL, random_tensors, trial
from percov2.entropy.schedule import order
from percov2.entropy.torch import intmath
from percov2.entropy.torch.grids import PlacedGrids
from percov2.entropy.transformer_config import TransformerConfig

__all__ = ["IntTransformer", "default_executor", "to_tensors", "whole_dtype"]


_EXECUTORS = {"torch": "executor", "triton": "triton_executor"}
_TRITON_CAPABILITY = (8, 0)
"""The lowest compute capability for which tests compile the kernels."""


def default_executor(device: torch.device) -> str:
    """Return the default executor of a device.

    For CUDA devices of compute capability 8.0 or higher this is "triton" if triton is installed. On
    other CUDA devices it is "torch", and a warning gives the reason. For all other devices it is
    "torch".
    """
    if device.type != "cuda":
        return "torch"
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed (pip install 'percov2[gpu]')"
    elif torch.cuda.get_device_capability(device) < _TRITON_CAPABILITY:
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    else:
        return "triton"
    warnings.warn(
        f"the entropy model runs on {device} in torch, slower than in Triton kernels: {reason}; "
        "executor='torch' silences this",
        RuntimeWarning,
        stacklevel=3,
    )
    return "torch"


def to_tensors(
    arrays: dict[str, NDArray[Any]], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return copies of arrays as tensors on a device."""
    return {name: torch.from_numpy(array.copy()).to(device) for name, array in arrays.items()}


def whole_dtype(dtype: torch.dtype) -> bool:
    """Return True for the dtypes of integers."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


@cache
def _executor(name: str, device: torch.device) -> Any:
    """Return the module of an executor, proven to agree with torch on this machine.

    The executor computes a random layer on ``device``, and torch computes it on the CPU. Raises
    RuntimeError if the results differ.
    """
    module = importlib.import_module(f"percov2.entropy.torch.{_EXECUTORS[name]}")
    oracle = importlib.import_module("percov2.entropy.torch.executor")
    if module is not oracle:
        tensors = random_tensors(TRIAL, 0)
        # The kernels use larger tiles from 1024 rows on. 11 grids give the queries more rows, and
        # the contents fewer, so the trial covers both.
        tokens, stages = trial(11 if device.type == "cuda" else 1)
        results = []
        for executor, place in ((module, device), (oracle, torch.device("cpu"))):
            placed = to_tensors(tensors, place)
            model = executor.Executor(TRIAL, placed, place)
            grids = torch.from_numpy(tokens).to(place, torch.int64)
            results.append(model.logits(model.encode(grids, stages)).cpu())
        if not torch.equal(*results):
            raise RuntimeError(
                f"the executor {name!r} does not compute what torch computes on this machine: "
                "the entropy model would give other tokens; use executor='torch'"
            )
    return module


@cache
def _replays(name: str, device: torch.device) -> bool:
    """Return True if an executor replays recorded passes on a GPU, as a trial shows.

    A warning says why a GPU does not.
    """
    module = _executor(name, device)
    if not hasattr(module.Executor, "replay"):
        return False
    tokens, stages = trial(3)
    grids = torch.from_numpy(tokens).to(device, torch.int64)
    coding = order(stages)
    executor = module.Executor(TRIAL, to_tensors(random_tensors(TRIAL, 0), device), device)
    expected = executor.encode(grids, stages)
    executor.replay()
    reason = "the results differ"
    try:
        for _ in range(3):  # as they are, recorded, and replayed
            staged, found = executor.staged(stages, len(grids)), []
            for stage in range(1, int(stages.max()) + 1):
                found.append(staged.residual().clone())
                places = coding[stages.reshape(-1)[coding] == stage]
                staged.accept(grids.flatten(1)[:, torch.from_numpy(places).to(device)])
            if not torch.equal(torch.cat(found, 1), expected):
                break
        else:
            return True
    except RuntimeError as error:
        reason = str(error)
    warnings.warn(
        f"CUDA graphs do not work on {torch.cuda.get_device_name(device)}, so decoding launches "
        f"every kernel: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _numbered(device: torch.device) -> torch.device:
    """Return the device with its number, because plain "cuda" depends on the thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class IntTransformer(int_transformer.IntTransformer):
    """An integer token transformer on one device. Residuals, logits and tokens are tensors.

    Args:
        config: sizes of the model.
        tensors: the arrays or tensors that ``tensor_layout(config)`` lists, by name.
        device: device of the passes.
        executor: "torch" (any device) or "triton" (CUDA devices). None means
            ``default_executor(device)``. The attribute ``executor_name`` holds the choice.

    Raises:
        ValueError: the tensors do not match the config or exceed the ranges of the program, or the
            executor does not run on the device.
        RuntimeError: the device or the executor does not compute exactly, or the executor is
            "triton" and triton is not installed.

    >>> config = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=1, hidden=8)
    >>> model = IntTransformer.random(config, seed=1)
    >>> model.logits(torch.zeros(1, 4, 8, dtype=torch.int32)).shape
    torch.Size([1, 4, 16])
    """

    def __init__(
        self,
        config: TransformerConfig,
        tensors: dict[str, Any],
        device: torch.device | str = "cpu",
        executor: str | None = None,
    ) -> None:
        place = torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device {str(device)!r} is not available on this machine; use cpu")
        self.device = _numbered(place)
        if executor is not None and executor not in _EXECUTORS:
            raise ValueError(f"executor is {executor!r}; it must be one of {tuple(_EXECUTORS)}")
        self.executor_name = executor or default_executor(self.device)
        super().__init__(config, tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config, self.tensors, self.device, self.executor_name)

    def _prepare(self) -> None:
        with torch.device("cpu"):  # ignore the default device of new tensors
            intmath.self_test(self.device)
            placed = to_tensors(self.tensors, self.device)
            module = _executor(self.executor_name, self.device)
            self.executor = module.Executor(self.config, placed, self.device)
            if self.device.type == "cuda" and _replays(self.executor_name, self.device):
                self.executor.replay()

    def encode(self, tokens: Tensor, stages: NDArray[np.int32]) -> Tensor:
        with intmath.exact_float32(self.device):
            return self.executor.encode(tokens, stages)

    def staged(self, stages: NDArray[np.int32], batch: int) -> Any:
        return _Staged(self.executor.staged(stages, batch), self.device)

    def join(
        self, maps: Sequence[NDArray[np.int32]], sent: Sequence[int] | None = None
    ) -> PlacedGrids:
        """Return the grids of stage maps for ``encode_joined`` and ``staged_joined``.

        The arguments are those of ``grids.Grids``.
        """
        placed: PlacedGrids = self.executor.grids(maps, sent).place(self.device)
        return placed

    def encode_joined(self, tokens: Tensor, placed: PlacedGrids) -> Tensor:
        """Return the residual of all queries of unequal grids in joint order, int32 [1, N, dim].

        ``tokens``, int64 [1, N] from ``place``, are those of all grids in raster order.
        """
        with intmath.exact_float32(self.device):
            return self.executor.encode_placed(tokens, placed)

    def staged_joined(self, placed: PlacedGrids) -> Any:
        """Return the stage-by-stage passes that decode unequal grids."""
        return _Staged(self.executor.staged_placed(placed), self.device)

    def logits(self, residual: Tensor) -> Tensor:
        with intmath.exact_float32(self.device):
            return self.executor.logits(residual)

    def place(self, tokens: Any) -> Tensor:
        """Return the tokens as int64 on the device, without waiting for the device.

        Tokens on the CPU are checked. Tokens on another device are clamped to the codebook.
        """
        if not isinstance(tokens, Tensor) or tokens.device.type == "cpu":
            placed = torch.from_numpy(super().place(tokens))
            return placed.to(self.device, torch.int64, non_blocking=True)
        if not whole_dtype(tokens.dtype):
            raise ValueError(f"tokens have dtype {tokens.dtype}; they must be integers")
        return tokens.to(self.device, torch.int64).clamp(0, self.config.codebook_size - 1)


class _Staged:
    """The passes of an executor under ``exact_float32``."""

    def __init__(self, staged: Any, device: torch.device) -> None:
        self._staged, self._device = staged, device
        self.accept = staged.accept
        self.tokens = staged.tokens

    def residual(self) -> Tensor:
        with intmath.exact_float32(self._device):
            return self._staged.residual()
