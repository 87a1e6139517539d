"""Tokens to intervals and back: schedule x integer model x quantizer x rANS.

Intervals of all tokens come from one pass; decoding takes one pass per stage. The coder sees
integers only, and the model never sees bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy import cdf, intmath, rans, schedule
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.stage_pass import StagedDecoder, one_pass_residual

_LOGITS_AT_ONCE = 2**21
"""Logits made at a time: they are coded while they are still in cache."""
_LOGITS_AT_ONCE_FUSED = 2**28
"""The same where one kernel codes them: 512 MiB, one launch for 256 images of 1024 tokens."""


class TokenCoder:
    """Codes token grids with one integer transformer.

    Args:
        model: the integer transformer; its device decides where the passes run.

    >>> from percov2.entropy.transformer_config import TransformerConfig
    >>> config = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=1, hidden=8)
    >>> coder = TokenCoder(IntTransformer.random(config, seed=1))
    >>> starts, freqs = coder.intervals(torch.zeros(1, 2, 3, dtype=torch.int32), "checkerboard")
    >>> freqs.shape
    (1, 6)
    >>> encoder = rans.RansEncoder([7])
    >>> encoder.push(starts.ravel(), freqs.ravel(), [6], coder.prob_bits)
    >>> coder.decode(rans.RansDecoder(*encoder.finish()), "checkerboard", 2, 3)
    tensor([[[0, 0, 0],
             [0, 0, 0]]], dtype=torch.int32)
    """

    def __init__(self, model: IntTransformer) -> None:
        self.model = model
        self.prob_bits = cdf.default_prob_bits(model.config.codebook_size)

    def intervals(
        self, tokens: torch.Tensor, schedule_name: str, threads: int = 1
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Intervals of every token, at ``prob_bits``: (starts, freqs), int32 [B, N].

        tokens int32 [B, h, w] on any device; N = h * w in coding order (``schedule.order``). On a
        GPU the host waits once, for both results. Raises ValueError for tokens outside the codebook
        or an unknown schedule, RuntimeError where torch is set to reduced precision.
        """
        stages = schedule.stages(schedule_name, *tokens.shape[1:])
        tokens = tokens.to(self.model.device, non_blocking=self.model.device.type != "cpu")
        residual = one_pass_residual(self.model, tokens, stages)
        coding = torch.from_numpy(schedule.order(stages))
        coding = coding.to(tokens.device, non_blocking=True)
        symbols = tokens.flatten(1)[:, coding].to(torch.int32)
        if tokens.device.type == "cpu":
            return self._intervals_on_cpu(residual, symbols, threads)
        return self._intervals_on_device(residual, symbols)

    def _intervals_on_cpu(
        self, residual: torch.Tensor, symbols: torch.Tensor, threads: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        starts = np.empty(symbols.shape, dtype=np.int32)
        freqs = np.empty(symbols.shape, dtype=np.int32)
        for part, logits in self._logits(residual):
            starts[:, part], freqs[:, part] = rans.intervals(
                logits, symbols[:, part], self.prob_bits, threads
            )
        return starts, freqs

    def _intervals_on_device(
        self, residual: torch.Tensor, symbols: torch.Tensor
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Intervals that reach the CPU by one copy, for which alone the CPU waits.

        Symbols outside the codebook are only known after that copy: their freq is 0.
        """
        parts = [
            cdf.marked_intervals(logits, symbols[:, part], self.prob_bits)
            for part, logits in self._logits(residual)
        ]
        both = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        starts, freqs = both.cpu().numpy()
        if not freqs.all():
            raise ValueError(
                f"tokens range from {int(symbols.min())} to {int(symbols.max())}; "
                f"the codebook has {self.model.config.codebook_size} entries"
            )
        return starts, freqs

    def _logits(self, residual: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of a residual int32 [B, n, dim], some positions at a time: int16 [B, m, V]."""
        batch, count = residual.shape[:2]
        fused = cdf.fused(self.model.device)
        at_once = _LOGITS_AT_ONCE_FUSED if fused else _LOGITS_AT_ONCE
        step = max(1, at_once // max(1, batch * self.model.config.codebook_size))
        for begin in range(0, count, step):
            part = slice(begin, begin + step)
            with intmath.exact_float32(self.model.device):
                logits = self.model.logits(residual[:, part])
            yield part, logits

    def decode(
        self,
        decoder: rans.RansDecoder,
        schedule_name: str,
        height: int,
        width: int,
        on_stage: Callable[[int], None] | None = None,
        threads: int = 1,
    ) -> torch.Tensor:
        """Decode the tokens of all streams of ``decoder``: int32 [B, height, width] on the CPU.

        ``on_stage(remaining)`` is called before each stage with the number of tokens per grid that
        are still to come; what it raises ends the decoding. Raises ValueError for an unknown
        schedule or a grid that is too large.
        """
        stages = schedule.stages(schedule_name, height, width)
        staged = StagedDecoder(self.model, stages, len(decoder.states))
        while staged.remaining:
            if on_stage is not None:
                on_stage(staged.remaining)
            parts = [
                decoder.decode_logits(logits.cpu(), self.prob_bits, threads=threads)
                for _, logits in self._logits(staged.residual())
            ]
            staged.accept(torch.from_numpy(np.concatenate(parts, axis=1)))
        return staged.tokens().cpu()
