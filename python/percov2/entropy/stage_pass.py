"""Passes of the integer transformer over the entries of token grids.

Encoding is one pass with the contents and queries of all stages, decoding one pass per stage. Both
give the same integers (docs/entropy-model.md); what computes them is the model's executor.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy import intmath
from percov2.entropy.int_transformer import IntTransformer

MAX_SIDE = 16384
"""Longest side of a token grid (relative positions are kept as int16)."""


def _check_stages(stages: NDArray[np.int32]) -> NDArray[np.int32]:
    """The stage map as int32 [h, w]; ValueError for anything but stages 1 .. S without gaps."""
    stages = np.asarray(stages)
    if stages.ndim != 2 or stages.size == 0 or max(stages.shape) > MAX_SIDE:
        raise ValueError(
            f"a stage map must be [height, width] with sides 1 .. {MAX_SIDE}, got {stages.shape}"
        )
    low, high = int(stages.min()), int(stages.max())
    if low < 1 or high > stages.size or not (np.bincount(stages.reshape(-1))[1:] > 0).all():
        raise ValueError(f"stages must be 1 .. S, each with a position; they are {low} .. {high}")
    return stages.astype(np.int32, copy=False)


def _check_dtype(tokens: Tensor) -> None:
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens have dtype {tokens.dtype}; they must be int32")


def _check_tokens(tokens: Tensor, codebook_size: int) -> None:
    _check_dtype(tokens)
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < codebook_size:
        raise ValueError(
            f"tokens range from {int(tokens.min())} to {int(tokens.max())}; "
            f"the codebook has {codebook_size} entries"
        )


def _placed_tokens(model: IntTransformer, tokens: Tensor) -> Tensor:
    """Tokens in the codebook, int64 on the model's device, without waiting for a device.

    Tokens on the CPU are checked; on another device, whose values only its host can tell after
    waiting for it, they are clamped.
    """
    size = model.config.codebook_size
    if tokens.device.type == "cpu":
        _check_tokens(tokens, size)
        return tokens.to(model.device, torch.int64, non_blocking=True)
    _check_dtype(tokens)
    return tokens.to(model.device, torch.int64).clamp(0, size - 1)


def one_pass_residual(model: IntTransformer, tokens: Tensor, stages: NDArray[np.int32]) -> Tensor:
    """The residual of all queries after the last layer, in coding order.

    tokens int32 [B, h, w]; stages int32 [h, w] with values 1 .. S. Returns int32 [B, h * w, dim];
    ``model.logits`` turns any part of it into logits. Tokens on another device than the CPU are
    clamped to the codebook, because comparing them would wait for the device. Raises ValueError for
    wrong tokens or stages, RuntimeError where torch is set to reduced precision.
    """
    stages = _check_stages(stages)
    height, width = stages.shape
    if tokens.ndim != 3 or tuple(tokens.shape[1:]) != stages.shape:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; they must be [B, {height}, {width}]"
        )
    placed = _placed_tokens(model, tokens)
    with intmath.exact_float32(model.device):
        return model.executor.encode(placed, stages)


def one_pass_logits(model: IntTransformer, tokens: Tensor, stages: NDArray[np.int32]) -> Tensor:
    """Logits of every token given all earlier stages: int16 [B, h * w, V] in coding order.

    Arguments and errors as for ``one_pass_residual``.
    """
    residual = one_pass_residual(model, tokens, stages)
    with intmath.exact_float32(model.device):
        return model.logits(residual)


class StagedDecoder:
    """Logits stage by stage, while the tokens are still being decoded.

    Args:
        model: the integer transformer.
        stages: int32 [h, w], values 1 .. S.
        batch: number of grids decoded together, >= 1.

    Use: while ``remaining``: ``logits()`` of the next stage, then ``accept`` its tokens. Raises
    ValueError for wrong stages.
    """

    def __init__(self, model: IntTransformer, stages: NDArray[np.int32], batch: int) -> None:
        stages = _check_stages(stages)
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1")
        self._model, self._batch = model, batch
        # Positions of the first g stages, g = 0 .. S, and how many stages are known.
        self._ends = np.bincount(stages.reshape(-1)).cumsum()
        self._known = 0
        self._staged = model.executor.staged(stages, batch)

    @property
    def remaining(self) -> int:
        """Tokens per grid that are not decoded yet."""
        return int(self._ends[-1] - self._ends[self._known])

    def logits(self) -> Tensor:
        """Logits of the next stage: int16 [B, n, V], its positions in raster order.

        Raises RuntimeError if no stage remains, or where torch is set to reduced precision.
        """
        residual = self.residual()
        with intmath.exact_float32(self._model.device):
            return self._model.logits(residual)

    def residual(self) -> Tensor:
        """The residual of the next stage's queries: int32 [B, n, dim], as ``logits`` needs it.

        Errors as for ``logits``.
        """
        if not self.remaining:
            raise RuntimeError("every stage is decoded; no logits remain")
        with intmath.exact_float32(self._model.device):
            return self._staged.residual()

    def accept(self, tokens: Tensor) -> None:
        """Take the tokens of the stage whose logits were computed last: int32 [B, n].

        Tokens on another device than the CPU are clamped to the codebook, because comparing them
        would wait for the device. Raises ValueError for a wrong shape, dtype or token.
        """
        count = int(self._ends[self._known + 1] - self._ends[self._known]) if self.remaining else 0
        if count == 0 or tuple(tokens.shape) != (self._batch, count):
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; "
                f"the next stage needs [{self._batch}, {count}]"
            )
        self._staged.accept(_placed_tokens(self._model, tokens))
        self._known += 1

    def tokens(self) -> Tensor:
        """The tokens decoded so far (0 elsewhere): int32 [B, h, w]."""
        return self._staged.tokens()
