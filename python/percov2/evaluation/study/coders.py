"""Coders of the study. They code the tokens of one photo as a payload and decode them."""

from __future__ import annotations

import binascii
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy import rans
from percov2.entropy.cdf import default_prob_bits
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.torch.direct import UNKNOWN, DirectPlan, int_direct_logits
from percov2.entropy.torch.int_transformer import IntTransformer
from percov2.entropy.uniform import uniform_model
from percov2.evaluation.study.schedules import Order, one_stage

__all__ = [
    "CHECK_BITS",
    "DirectCoder",
    "OrderCoder",
    "StudyCoder",
    "TokenMap",
    "token_check",
    "token_map",
    "uniform_coder",
]

CHECK_BITS = 16
"""Size in bits of the check in every payload. A file has the same check."""


class TokenMap(NamedTuple):
    """The tokens of one photo, int32 [n], scale by scale and row by row.

    ``shape`` is the shape of the finest grid.
    """

    shape: tuple[int, int]
    tokens: NDArray[np.int32]


def token_map(grid: NDArray[np.int32]) -> TokenMap:
    """Return the map of a single grid, int32 [h, w]."""
    return TokenMap((grid.shape[0], grid.shape[1]), grid.reshape(-1))


class StudyCoder(ABC):
    """A coder of the tokens of a map in stages."""

    @abstractmethod
    def stage_bits(self, tokens: TokenMap) -> list[NDArray[np.float64]]:
        """Return the cost in bits of each token's interval, one array per stage."""

    @abstractmethod
    def encode(self, tokens: TokenMap) -> bytes:
        """Return a payload that holds all tokens and their ``token_check``."""

    @abstractmethod
    def _decoded(self, decoder: rans.RansDecoder, shape: tuple[int, int]) -> NDArray[np.int32]: ...

    def decode(self, payload: bytes, shape: tuple[int, int]) -> NDArray[np.int32]:
        """Return the tokens of a payload. Raise ValueError if the check does not match."""
        decoder = rans.RansDecoder(payload, np.array([0, len(payload)]))
        tokens = self._decoded(decoder, shape)
        if not decoder.finished([token_check(tokens)]).all():
            raise ValueError(f"the check of a payload of {len(payload)} bytes does not match")
        return tokens


def token_check(tokens: NDArray[np.int32]) -> int:
    """Return the CRC-16 of tokens, int32 [n], which is the first state of their stream."""
    return binascii.crc_hqx(tokens.astype("<i4").tobytes(), 0xFFFF)


class OrderCoder(StudyCoder):
    """A coder of single grids with an integer transformer, in the stages of an order."""

    def __init__(self, coder: TokenCoder, order: Order) -> None:
        self._coder, self._order = coder, order

    def stage_bits(self, tokens: TokenMap) -> list[NDArray[np.float64]]:
        stages = self._order(*tokens.shape)
        _, freqs = self._coder.intervals(tokens.tokens.reshape(1, *tokens.shape), stages)
        ends = np.bincount(stages.reshape(-1))[1:].cumsum()
        return np.split(self._coder.prob_bits - np.log2(freqs[0]), ends[:-1])

    def encode(self, tokens: TokenMap) -> bytes:
        grids, checks = tokens.tokens.reshape(1, *tokens.shape), [token_check(tokens.tokens)]
        return self._coder.encode(grids, self._order(*tokens.shape), checks).finish()[0].tobytes()

    def _decoded(self, decoder: rans.RansDecoder, shape: tuple[int, int]) -> NDArray[np.int32]:
        grids = self._coder.decode(decoder, self._order(*shape), *shape)
        return rans.as_array(grids).reshape(-1)


def uniform_coder(codebook_size: int) -> OrderCoder:
    """Return the reference coder, which codes every token in one stage at log2 V bits."""
    return OrderCoder(TokenCoder(uniform_model(codebook_size)), one_stage)


class DirectCoder(StudyCoder):
    """A coder whose entries are keys, readers and outputs at once. Each stage takes one pass.

    The model must run on the executor "torch". ``plan`` maps the rows and columns of a grid to the
    plan of its tokens.
    """

    def __init__(
        self, model: IntTransformer, plan: Callable[[int, int], DirectPlan], codebook_size: int
    ) -> None:
        self._model, self._plan, self._size = model, plan, codebook_size
        self._prob_bits = default_prob_bits(codebook_size)

    def _stage(
        self, plan: DirectPlan, tokens: NDArray[np.int32], shape: tuple[int, int], stage: int
    ) -> tuple[NDArray[np.int64], torch.Tensor]:
        """Return the indices of a stage's tokens, and their logits, int16 [n, V]."""
        here = np.flatnonzero(plan.stage == stage)
        seen = np.flatnonzero(plan.entries.key_stage <= plan.entries.key_stage[here].max())
        payload = plan.payload(np.where(plan.stage < stage, tokens, UNKNOWN))
        logits = int_direct_logits(self._model, plan.entries.take(seen), payload[seen], shape)
        first = int(plan.first[here[0]])
        wanted = torch.from_numpy(np.searchsorted(seen, here)).to(logits.device)
        return here, logits[wanted, first : first + self._size].contiguous()

    def _intervals(self, tokens: TokenMap) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Yield (starts, freqs), int32 [n], for every stage."""
        plan = self._plan(*tokens.shape)
        for stage in range(1, int(plan.stage.max()) + 1):
            here, logits = self._stage(plan, tokens.tokens, tokens.shape, stage)
            yield rans.intervals(logits.cpu().numpy(), tokens.tokens[here], self._prob_bits)

    def stage_bits(self, tokens: TokenMap) -> list[NDArray[np.float64]]:
        return [self._prob_bits - np.log2(freqs) for _, freqs in self._intervals(tokens)]

    def encode(self, tokens: TokenMap) -> bytes:
        starts, freqs = zip(*self._intervals(tokens), strict=True)
        encoder = rans.RansEncoder([token_check(tokens.tokens)])
        counts = np.array([len(tokens.tokens)], dtype=np.int64)
        encoder.encode(np.concatenate(starts), np.concatenate(freqs), counts, self._prob_bits)
        return encoder.finish()[0].tobytes()

    def _decoded(self, decoder: rans.RansDecoder, shape: tuple[int, int]) -> NDArray[np.int32]:
        plan = self._plan(*shape)
        tokens = np.full(len(plan.stage), UNKNOWN, dtype=np.int32)
        for stage in range(1, int(plan.stage.max()) + 1):
            here, logits = self._stage(plan, tokens, shape, stage)
            tokens[here] = decoder.decode(logits[None].cpu(), self._prob_bits)[0]
        return tokens
