"""Coders of the study of entropy schedules: the tokens of one photo <-> a payload."""

from __future__ import annotations

import binascii
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

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

CHECK_BITS = 16
"""Of every payload, as in a file."""


class TokenMap(NamedTuple):
    """Tokens of one photo.

    shape: rows and columns of its (finest) grid; tokens: int32 [n], row after row, where there are
    several scales one after the other.
    """

    shape: tuple[int, int]
    tokens: NDArray[np.int32]


def token_map(grid: NDArray[np.int32]) -> TokenMap:
    """The map of a single grid int32 [h, w]."""
    return TokenMap((grid.shape[0], grid.shape[1]), grid.reshape(-1))


class StudyCoder(Protocol):
    """Codes the tokens of a map in stages."""

    def stage_bits(self, tokens: TokenMap) -> list[NDArray[np.float64]]:
        """Bits that each token's interval costs, one array per stage."""
        ...

    def encode(self, tokens: TokenMap) -> bytes:
        """The payload: all tokens and the 16-bit check of ``token_check``."""
        ...

    def decode(self, payload: bytes, shape: tuple[int, int]) -> NDArray[np.int32]:
        """The tokens of a payload, from it and the grid's shape alone.

        Raises ValueError for a payload whose check does not hold.
        """
        ...


def token_check(tokens: NDArray[np.int32]) -> int:
    """CRC-16 of tokens int32 [n]: the first state of the stream that holds them."""
    return binascii.crc_hqx(tokens.astype("<i4").tobytes(), 0xFFFF)


class OrderCoder:
    """One grid, by an integer transformer in the stages of an order."""

    def __init__(self, coder: TokenCoder, order: Order) -> None:
        self._coder, self._order = coder, order

    def stage_bits(self, tokens: TokenMap) -> list[NDArray[np.float64]]:
        """See :meth:`StudyCoder.stage_bits`."""
        stages = self._order(*tokens.shape)
        _, freqs = self._coder.intervals(_grids(tokens), stages)
        ends = np.bincount(stages.reshape(-1))[1:].cumsum()
        return np.split(self._coder.prob_bits - np.log2(freqs[0]), ends[:-1])

    def encode(self, tokens: TokenMap) -> bytes:
        """See :meth:`StudyCoder.encode`."""
        checks = [token_check(tokens.tokens)]
        encoder = self._coder.encoder(_grids(tokens), self._order(*tokens.shape), checks)
        return encoder.finish()[0].tobytes()

    def decode(self, payload: bytes, shape: tuple[int, int]) -> NDArray[np.int32]:
        """See :meth:`StudyCoder.decode`."""
        decoder = self._coder.decoder(payload, np.array([0, len(payload)]))
        grids = self._coder.decode(decoder, self._order(*shape), *shape)
        tokens = rans.as_array(grids).reshape(-1)
        if not decoder.finished([token_check(tokens)]).all():
            raise ValueError(f"the check of a payload of {len(payload)} bytes does not hold")
        return tokens


def _grids(tokens: TokenMap) -> NDArray[np.int32]:
    return tokens.tokens.reshape(1, *tokens.shape)


def uniform_coder(codebook_size: int) -> OrderCoder:
    """What everything is compared with: every token costs log2 V bits, in one stage."""
    return OrderCoder(TokenCoder(uniform_model(codebook_size)), one_stage)


class DirectCoder:
    """Entries that are keys, readers and read out at once: one pass per stage, also to encode.

    Args:
        model: integers, run by the executor "torch".
        plan: rows and columns of a grid -> how its tokens are coded.
        codebook_size: of each codebook.
    """

    def __init__(
        self,
        model: IntTransformer,
        plan: Callable[[int, int], DirectPlan],
        codebook_size: int,
    ) -> None:
        self._model, self._plan, self._size = model, plan, codebook_size
        self._prob_bits = default_prob_bits(codebook_size)

    def _stage(
        self, plan: DirectPlan, tokens: NDArray[np.int32], shape: tuple[int, int], stage: int
    ) -> tuple[NDArray[np.int64], torch.Tensor]:
        """Indices of a stage's tokens, and their logits int16 [n, V] given those before it."""
        here = np.flatnonzero(plan.stage == stage)
        seen = np.flatnonzero(plan.entries.key_stage <= plan.entries.key_stage[here].max())
        payload = plan.payload(np.where(plan.stage < stage, tokens, UNKNOWN))
        logits = int_direct_logits(self._model, plan.entries.take(seen), payload[seen], shape)
        first = int(plan.first[here[0]])
        wanted = torch.from_numpy(np.searchsorted(seen, here)).to(logits.device)
        return here, logits[wanted, first : first + self._size].contiguous()

    def _intervals(self, tokens: TokenMap) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Starts and freqs of every stage, int32 [n]."""
        plan = self._plan(*tokens.shape)
        for stage in range(1, int(plan.stage.max()) + 1):
            here, logits = self._stage(plan, tokens.tokens, tokens.shape, stage)
            yield rans.intervals(logits.cpu(), tokens.tokens[here], self._prob_bits)

    def stage_bits(self, tokens: TokenMap) -> list[NDArray[np.float64]]:
        """See :meth:`StudyCoder.stage_bits`."""
        return [self._prob_bits - np.log2(freqs) for _, freqs in self._intervals(tokens)]

    def encode(self, tokens: TokenMap) -> bytes:
        """See :meth:`StudyCoder.encode`."""
        starts, freqs = zip(*self._intervals(tokens), strict=True)
        encoder = rans.RansEncoder([token_check(tokens.tokens)])
        counts = np.array([len(tokens.tokens)], dtype=np.int64)
        encoder.push(np.concatenate(starts), np.concatenate(freqs), counts, self._prob_bits)
        return encoder.finish()[0].tobytes()

    def decode(self, payload: bytes, shape: tuple[int, int]) -> NDArray[np.int32]:
        """See :meth:`StudyCoder.decode`."""
        plan = self._plan(*shape)
        decoder = rans.RansDecoder(payload, np.array([0, len(payload)]))
        tokens = np.full(len(plan.stage), UNKNOWN, dtype=np.int32)
        for stage in range(1, int(plan.stage.max()) + 1):
            here, logits = self._stage(plan, tokens, shape, stage)
            tokens[here] = decoder.decode_logits(logits[None].cpu(), self._prob_bits)[0]
        if not decoder.finished([token_check(tokens)]).all():
            raise ValueError(f"the check of a payload of {len(payload)} bytes does not hold")
        return tokens
