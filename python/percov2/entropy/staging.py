"""Passes of the integer transformer over the entries of token grids.

Encoding is one pass with the contents and queries of all stages; decoding is one pass per stage.
Both give the same integers (docs/reference/entropy-model.md). The model's executor computes them.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.ranges import whole_number
from percov2.entropy.rans import OneWay
from percov2.entropy.schedule import integer_map

__all__ = ["StagedDecoder", "check_stages", "one_pass_logits", "one_pass_residual"]


_MAX_SIDE = 16384
"""Longest side of a token grid (relative positions are kept as int16)."""


def check_stages(stages: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the stage map as int32 [h, w]. Raise ValueError unless it has 1 .. S without gaps."""
    stages = integer_map(stages)
    if stages.ndim != 2 or stages.size == 0 or max(stages.shape) > _MAX_SIDE:
        raise ValueError(
            f"a stage map must be [height, width] with sides 1 .. {_MAX_SIDE}, got {stages.shape}"
        )
    low, high = int(stages.min()), int(stages.max())
    inside = low >= 1 and high <= stages.size
    stages = stages.astype(np.int32, copy=False)
    if not inside or not (np.bincount(stages.reshape(-1))[1:] > 0).all():
        raise ValueError(f"stages must be 1 .. S, each with a position; they are {low} .. {high}")
    return stages


def one_pass_residual(model: IntTransformer, tokens: Any, stages: NDArray[np.int32]) -> Any:
    """Return the residual of all queries after the last layer, in coding order.

    ``model.logits`` turns any part of it into logits.

    Args:
        model: the model that runs the pass.
        tokens: int32 [B, h, w], an array or a tensor as the model expects. A GPU clamps them to the
            codebook, because a check would wait for the GPU.
        stages: int32 [h, w] with values 1 .. S.

    Returns:
        int32 [B, h * w, dim], an array or a tensor as the model returns it.

    Raises:
        ValueError: wrong tokens or stages.
        RuntimeError: torch runs the pass and allows reduced precision.
    """
    stages = check_stages(stages)
    height, width = stages.shape
    if len(tokens.shape) != 3 or tuple(tokens.shape[1:]) != stages.shape:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; they must be [B, {height}, {width}]"
        )
    return model.encode(model.place(tokens), stages)


def one_pass_logits(model: IntTransformer, tokens: Any, stages: NDArray[np.int32]) -> Any:
    """Return the logits of every token given all earlier stages, int16 [B, h * w, V].

    They are in coding order. The arguments and errors are those of ``one_pass_residual``.
    """
    return model.logits(one_pass_residual(model, tokens, stages))


class StagedDecoder(OneWay):
    """The stages of token grids during decoding.

    While ``remaining`` is not 0, call ``logits()`` for the next stage, then ``accept`` with its
    tokens. Concurrent calls from several threads take turns.

    Args:
        model: the model that runs the passes. It decides whether results are arrays or tensors.
        stages: int32 [h, w] with values 1 .. S.
        batch: number of grids decoded together, at least 1.

    Raises:
        ValueError: wrong stages or batch.
        MemoryError: the batch needs more memory than there is.

    >>> from percov2.entropy import IntTransformer, TransformerConfig
    >>> sizes = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=1, hidden=8)
    >>> model = IntTransformer.random(sizes, seed=1)
    >>> staged = StagedDecoder(model, np.array([[1, 2], [2, 2]]), batch=1)
    >>> staged.logits().shape, staged.remaining
    ((1, 1, 16), 4)
    >>> staged.accept(np.array([[7]], np.int32))
    >>> staged.logits().shape, staged.tokens().tolist()
    ((1, 3, 16), [[[7, 0], [0, 0]]])
    """

    def __init__(self, model: IntTransformer, stages: NDArray[np.int32], batch: int) -> None:
        stages = check_stages(stages)
        self._model, self._batch = model, whole_number("batch", batch, 1, 2**31 - 1)
        # Positions of the first g stages, g = 0 .. S, and how many stages are known.
        self._ends = np.bincount(stages.reshape(-1)).cumsum()
        self._known, self._asked = 0, False
        self._turn = Lock()
        try:
            self._staged = model.staged(stages, self._batch)
        except MemoryError as error:
            raise MemoryError(f"batch is {batch}; there is no memory for as many grids") from error

    @property
    def remaining(self) -> int:
        """Return the number of tokens per grid that are not decoded yet."""
        return int(self._ends[-1] - self._ends[self._known])

    def logits(self) -> Any:
        """Return the logits of the next stage, int16 [B, n, V], with its positions in raster order.

        Raises:
            RuntimeError: no stage remains, or torch allows reduced precision.
        """
        return self._model.logits(self.residual())

    def residual(self) -> Any:
        """Return the residual of the next stage's queries, int32 [B, n, dim].

        The model's ``logits`` turns it into logits. The errors are those of ``logits``.
        """
        with self._turn:
            if not self.remaining:
                raise RuntimeError("every stage is decoded; no logits remain")
            self._asked = True
            return self._staged.residual()

    def accept(self, tokens: Any) -> None:
        """Take the tokens of the next stage, int32 [B, n].

        Raises:
            ValueError: a wrong shape, dtype or token. (A GPU clamps wrong tokens instead.)
            RuntimeError: neither ``logits`` nor ``residual`` was called for the stage.
        """
        with self._turn:
            ends, known, shape = self._ends, self._known, tuple(np.shape(tokens))
            count = int(ends[known + 1] - ends[known]) if self.remaining else 0
            if count == 0 or shape != (self._batch, count):
                raise ValueError(
                    f"tokens have shape {shape}; the next stage needs [{self._batch}, {count}]"
                )
            if not self._asked:
                raise RuntimeError("call logits() before accept(): the tokens depend on them")
            self._staged.accept(self._model.place(tokens))
            self._known, self._asked = known + 1, False

    def tokens(self) -> Any:
        """Return the tokens decoded so far, int32 [B, h, w], with 0 at the other positions."""
        return self._staged.tokens()
