"""Passes of the integer transformer over the entries of token grids.

Encoding is one pass with the contents and queries of all stages. Decoding stage g is one pass with
the contents of stage g - 1 and the queries of stage g over cached keys and values. An entry sees
the same keys either way and the arithmetic is exact, so the logits are equal integers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy import intmath
from percov2.entropy.entries import (
    START_ENTRIES,
    content_entries,
    join,
    query_entries,
    start_entries,
)
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.schedule import order

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
    payload = _placed_tokens(model, tokens)
    with intmath.exact_float32(model.device):
        coding = order(stages)
        stage = stages.reshape(-1)[coding]
        # Nobody reads the contents of the last stage.
        known = int(np.searchsorted(stage, stage[-1]))
        contents = content_entries(stage[:known], coding[:known], width)
        keys = join(start_entries(), contents)
        content_plan = model.plan(keys, keys)
        query_plan = model.plan(query_entries(stage, coding, width), keys)

        batch = tokens.shape[0]
        sequence = torch.from_numpy(coding).to(model.device, non_blocking=True)
        place = model.place_payload(height, width, sequence)
        ordered = payload.reshape(batch, -1)[:, sequence[:known]]
        start = model.start_payload(height, width).expand(batch, -1, -1)
        known_residual = torch.cat([start, model.content_payload(ordered, place[:known])], 1)
        residual = model.query_payload(batch, place)
        for layer in model.layers:
            k, v = layer.keys_values(known_residual)
            residual = layer.advance(residual, k, v, query_plan)
            if layer is not model.layers[-1]:  # nobody reads what contents become after it
                known_residual = layer.advance(known_residual, k, v, content_plan)
        return residual


def one_pass_logits(model: IntTransformer, tokens: Tensor, stages: NDArray[np.int32]) -> Tensor:
    """Logits of every token given all earlier stages: int16 [B, h * w, V] in coding order.

    Arguments and errors as for ``one_pass_residual``.
    """
    residual = one_pass_residual(model, tokens, stages)
    with intmath.exact_float32(model.device):
        return model.logits(residual)


def _untouched(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """int8 zeros; on the CPU memory that is not used before it is written.

    A file may declare a large grid and then turn out to be broken.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype=np.int8))
    return torch.zeros(shape, dtype=torch.int8, device=device)


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
        self._model, self._shape, self._batch = model, stages.shape, batch
        coding = order(stages)
        stage = stages.reshape(-1)[coding]
        self._ends = np.searchsorted(stage, np.arange(stage[-1] + 1), side="right")
        self._stage = 0  # the last stage whose tokens are known
        width = stages.shape[1]
        self._keys = join(start_entries(), content_entries(stage, coding, width))
        self._queries = query_entries(stage, coding, width)
        self._coding = torch.from_numpy(coding).to(model.device)
        # In coding order; stage g occupies [ends[g - 1], ends[g]).
        self._tokens = torch.zeros(batch, len(coding), dtype=torch.int64, device=model.device)
        capacity = START_ENTRIES + int(self._ends[-2])
        shape = (batch, capacity, model.config.inner)
        self._cache = [tuple(_untouched(shape, model.device) for _ in "kv") for _ in model.layers]

    @property
    def remaining(self) -> int:
        """Tokens per grid that are not decoded yet."""
        return int(self._ends[-1] - self._ends[self._stage])

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
        model = self._model
        known, end = int(self._ends[self._stage]), int(self._ends[self._stage + 1])
        first = int(self._ends[self._stage - 1]) if self._stage else 0
        with intmath.exact_float32(model.device):
            height, width = self._shape
            place = model.place_payload(height, width, self._coding[first:end])
            if self._stage:
                new = model.content_payload(self._tokens[:, first:known], place[: known - first])
                fresh = slice(START_ENTRIES + first, START_ENTRIES + known)
            else:
                new = model.start_payload(height, width).repeat(self._batch, 1, 1)
                fresh = slice(0, START_ENTRIES)
            residual = model.query_payload(self._batch, place[known - first :])
            keys = self._keys.take(slice(0, fresh.stop))
            content_plan = model.plan(self._keys.take(fresh), keys)
            query_plan = model.plan(self._queries.take(slice(known, end)), keys)
            for layer, (k, v) in zip(model.layers, self._cache, strict=True):
                k[:, fresh], v[:, fresh] = layer.keys_values(new)
                residual = layer.advance(residual, k, v, query_plan)
                if layer is not model.layers[-1]:
                    new = layer.advance(new, k, v, content_plan)
            return residual

    def accept(self, tokens: Tensor) -> None:
        """Take the tokens of the stage whose logits were computed last: int32 [B, n].

        Raises ValueError for a wrong shape, dtype or token.
        """
        known = int(self._ends[self._stage])
        end = int(self._ends[self._stage + 1]) if self.remaining else known
        if end == known or tuple(tokens.shape) != (self._batch, end - known):
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; "
                f"the next stage needs [{self._batch}, {end - known}]"
            )
        _check_tokens(tokens, self._model.config.codebook_size)
        self._tokens[:, known:end] = tokens.to(self._tokens.device)
        self._stage += 1

    def tokens(self) -> Tensor:
        """The tokens decoded so far (0 elsewhere): int32 [B, h, w]."""
        grid = torch.zeros_like(self._tokens)
        grid[:, self._coding] = self._tokens
        return grid.to(torch.int32).view(self._batch, *self._shape)
