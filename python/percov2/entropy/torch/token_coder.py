"""The coder of tokens with a model on any device of torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy import rans, schedule, token_coder
from percov2.entropy.sampling import check_draw, philox
from percov2.entropy.staging import StagedDecoder, check_stages, one_pass_residual
from percov2.entropy.token_coder import grid_sides, refuse_outsiders
from percov2.entropy.torch import cdf, rans_cuda, sampling
from percov2.entropy.torch.coder_proof import prove_coder
from percov2.entropy.torch.int_transformer import IntTransformer, whole_dtype

__all__ = ["CODERS", "CodedGrids", "TokenCoder", "default_coder"]


_LOGITS_AT_ONCE_FUSED = 2**28
"""Logits per call of the model if one kernel codes them. They take 512 MiB of memory."""
_TOKENS_AT_ONCE = 2**18
_BYTES_AT_ONCE = 2**32
"""Memory limit of a batch on a CUDA device, besides its logits."""

CODERS = ("cpu", "cuda")


def default_coder(device: torch.device) -> str:
    """Return the default coder of a model on ``device``.

    For CUDA devices this is "cuda" if possible. Otherwise it is "cpu", and a warning gives the
    reason. For all other devices it is "cpu". Both coders write the same bytes.
    """
    if device.type != "cuda":
        return "cpu"
    if not rans.cuda_built():
        reason = "percov2 was built without CUDA, and docs/how-to/gpu.md says how to build with it"
    elif not rans.cuda_devices():
        reason = "the CUDA runtime in percov2 is newer than the driver of this machine"
    elif torch.cuda.get_device_capability(device) < rans_cuda.CAPABILITY:
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    else:
        return "cuda"
    warnings.warn(
        f"tokens are made on {device} and coded on the CPU: {reason}; coder='cpu' silences this",
        RuntimeWarning,
        stacklevel=3,
    )
    return "cpu"


class CodedGrids(token_coder.CodedGrids):
    """The intervals of grids on a CUDA device."""

    _coder: TokenCoder

    def __init__(
        self,
        coder: TokenCoder,
        maps: Sequence[NDArray[np.int32]],
        starts: torch.Tensor,
        freqs: torch.Tensor,
        symbols: torch.Tensor,
    ) -> None:
        super().__init__(coder, maps, starts, freqs)
        self._symbols = symbols

    def _pushed(
        self, starts: Any, freqs: Any, counts: NDArray[np.int64], checks: Any, threads: int
    ) -> rans.RansEncoder:
        states = self._coder.placed_checks(checks)
        lengths = None
        if (counts != starts.shape[1]).any():
            lengths = torch.from_numpy(counts.astype(np.int32)).to(states.device, non_blocking=True)
        bits = self._coder.prob_bits
        streams = rans_cuda.encode(starts.contiguous(), freqs.contiguous(), states, bits, lengths)
        try:
            return rans.RansEncoder.resumed(*streams.to_host())
        except ValueError:
            refuse_outsiders(self._symbols, self._coder.model.config.codebook_size)
            raise


class TokenCoder(token_coder.TokenCoder):
    """A coder of token grids with an integer transformer on a device.

    Decoded grids are tensors on the CPU. If the device is a GPU, the CPU waits once per encoding,
    for the intervals or for the bytes.

    Args:
        model: the integer transformer, on the device of the passes.
        coder: "cpu" or "cuda", the device type that writes and reads the streams. None means
            ``default_coder``. The attribute ``coder_name`` holds the choice.

    Raises:
        ValueError: an unknown coder.
        RuntimeError: coding on the model's device gives other results than on the CPU.
    """

    model: IntTransformer

    def __init__(self, model: IntTransformer, coder: str | None = None) -> None:
        if coder is not None and coder not in CODERS:
            raise ValueError(f"coder is {coder!r}; it must be one of {CODERS}")
        super().__init__(model)
        self.coder_name = coder or default_coder(model.device)
        self.joins = model.device.type == "cuda"
        if model.device.type == "cuda":
            prove_coder(model.device, model.config.codebook_size, self.coder_name == "cuda")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.coder_name)

    @property
    def tokens_at_once(self) -> int:
        if self.model.device.type != "cuda":
            return super().tokens_at_once
        config = self.model.config
        # A content and a query per token: residuals of four bytes before and after a map, hidden
        # activations, queries, keys and values. The cache of staged decoding comes on top.
        bytes_per_token = 16 * config.dim + 2 * config.hidden + 6 * config.inner
        bytes_per_token += 2 * config.layers * config.inner
        return min(_TOKENS_AT_ONCE, _BYTES_AT_ONCE // bytes_per_token)

    def encode(
        self,
        tokens: Any,
        scheduled: schedule.Schedule,
        checks: rans.ArrayLike,
        threads: int = 1,
        sent: int = 0,
    ) -> rans.RansEncoder:
        if self.coder_name == "cuda":
            # Before the pass, because copying pageable memory may wait for the stream.
            checks = self.placed_checks(checks)
        return super().encode(tokens, scheduled, checks, threads, sent)

    def placed_checks(self, checks: Any) -> torch.Tensor:
        """Return checks as int32 [B] on the model's device."""
        if not isinstance(checks, torch.Tensor):
            checks = torch.from_numpy(np.array(checks, dtype=np.int32))
        return checks.to(self.model.device, non_blocking=True)

    def code(
        self, tokens: Any, scheduled: schedule.Schedule, threads: int = 1
    ) -> token_coder.CodedGrids:
        if self.coder_name == "cpu":
            return super().code(tokens, scheduled, threads)
        stages = schedule.stage_map(scheduled, *grid_sides(tokens))
        residual, symbols = self._passed(tokens, scheduled)
        starts, freqs = self._intervals_on_device(residual, symbols)
        return CodedGrids(self, [stages], starts, freqs, symbols)

    def code_joined(
        self, grids: Sequence[Any], schedules: Sequence[schedule.Schedule]
    ) -> token_coder.CodedGrids:
        arrays = [rans.as_array(grid, "tokens") for grid in grids]
        maps = _stage_maps(schedules, [grid_sides(array[None]) for array in arrays])
        flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
        if not whole_dtype(flat.dtype):
            raise ValueError(f"tokens have dtype {flat.dtype}; they must be integers")
        tokens = flat.to(torch.int64)[None].to(self.model.device, non_blocking=True)
        placed = self.model.join(maps)
        # Place in the joint order of each token of each grid; the padding is never read.
        joint = placed.grids
        columns = np.arange(int(joint.sizes.max()))
        there = columns < joint.sizes[:, None]
        index = np.zeros(there.shape, dtype=np.int64)
        index[there] = joint.query_at
        rows = torch.from_numpy(index).to(self.model.device, non_blocking=True)
        residual = self.model.encode_joined(self.model.place(tokens), placed)
        symbols = tokens[:, placed.sequence].to(torch.int32)
        intervals = self._intervals_on_device(residual, symbols)[:, 0][:, rows]
        if self.coder_name == "cuda":
            return CodedGrids(self, maps, intervals[0], intervals[1], symbols)
        starts, freqs = intervals.cpu().numpy()
        if not freqs.all():
            refuse_outsiders(symbols, self.model.config.codebook_size)
        return token_coder.CodedGrids(self, maps, starts, freqs)

    def intervals(
        self, tokens: Any, scheduled: schedule.Schedule, threads: int = 1
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if self.model.device.type == "cpu":
            return super().intervals(tokens, scheduled, threads)
        residual, symbols = self._passed(tokens, scheduled)
        starts, freqs = self._intervals_on_device(residual, symbols).cpu().numpy()
        if not freqs.all():
            refuse_outsiders(symbols, self.model.config.codebook_size)
        return starts, freqs

    def _passed(
        self, tokens: Any, scheduled: schedule.Schedule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stages = schedule.stage_map(scheduled, *grid_sides(tokens))
        if not isinstance(tokens, torch.Tensor):
            tokens = torch.from_numpy(np.array(rans.as_array(tokens, "tokens")))
        if whole_dtype(tokens.dtype) and tokens.dtype != torch.int32:
            tokens = tokens.to(torch.int64)  # torch computes little with unsigned integers
        tokens = tokens.to(self.model.device, non_blocking=self.model.device.type != "cpu")
        # Before the pass, because copying pageable memory may wait for the stream.
        coding = torch.from_numpy(schedule.order(stages)).to(tokens.device, non_blocking=True)
        residual = one_pass_residual(self.model, tokens, stages)
        return residual, tokens.flatten(1)[:, coding].to(torch.int32)

    def _intervals_on_device(self, residual: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """Return starts and freqs, int32 [2, B, N], without waiting for the device.

        Symbols outside the codebook raise no error: their freq is 0.
        """
        parts = [
            cdf.marked_intervals(logits, symbols[:, part], self.prob_bits)
            for part, logits in self._logits(residual)
        ]
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _logits_at_once(self) -> int:
        fused = cdf.fused(self.model.device)
        return _LOGITS_AT_ONCE_FUSED if fused else super()._logits_at_once()

    def decoder(
        self,
        buffer: bytes | NDArray[np.uint8],
        offsets: NDArray[np.int64],
        states: NDArray[np.uint32] | None = None,
        positions: NDArray[np.int64] | None = None,
    ) -> Any:
        if self.coder_name == "cpu":
            return super().decoder(buffer, offsets, states, positions)
        return rans_cuda.CudaRansDecoder(
            torch.from_numpy(np.frombuffer(buffer, dtype=np.uint8).copy()),
            torch.from_numpy(np.asarray(offsets, dtype=np.int64)),
            self.model.device,
            None if states is None else torch.from_numpy(states.astype(np.int32)),
            None if positions is None else torch.from_numpy(np.asarray(positions, dtype=np.int64)),
        )

    def decode_joined(
        self,
        decoder: Any,
        schedules: Sequence[schedule.Schedule],
        shapes: Sequence[tuple[int, int]],
        on_stage: Callable[[NDArray[np.int64]], None] | None = None,
        threads: int = 1,
        sent: Sequence[int] = (),
        seeds: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        maps = _stage_maps(schedules, shapes)
        held = [self._sent(*one) for one in zip(maps, sent or [0] * len(maps), strict=True)]
        placed = self.model.join(maps, held)
        joint, staged = placed.grids, self.model.staged_joined(placed)
        rows = joint.rows()
        there = torch.from_numpy(rows).to(self.model.device, non_blocking=True)
        left = np.diff(rows).sum(0)
        for stage, bounds in enumerate(rows):
            read = int(bounds[-1])
            if on_stage is not None and read:
                on_stage(left)
            residual = staged.residual()
            tokens = self._rows(decoder, residual[:, :read], bounds, there[stage], threads)
            if read < residual.shape[1]:
                drawn = joint.drawn(stage)
                for i, places in drawn:
                    check_draw((1, len(places), 0), places, seeds[i])
                words = np.concatenate([philox(seeds[i], places) for i, places in drawn])
                tokens += [
                    sampling.draw_with(logits, words[part])
                    for part, logits in self._logits(residual[:, read:])
                ]
            staged.accept(self.model.place(self._joined(tokens)))
            left = left - np.diff(bounds)
        return joint.of_each(staged.tokens()[0].cpu())

    def _rows(
        self,
        decoder: Any,
        residual: torch.Tensor,
        bounds: NDArray[np.int64],
        there: torch.Tensor,
        threads: int,
    ) -> list[torch.Tensor]:
        """Decode the tokens of a stage of unequal grids: parts of int32 [1, n] on the device.

        ``bounds`` are the rows of each stream, and ``there`` is a copy of them on the device.
        """
        tokens = []
        for part, logits in self._logits(residual):
            begin, end = part.start, part.start + logits.shape[1]
            if self.coder_name == "cuda":
                mine = there
                if (begin, end) != (0, residual.shape[1]):
                    mine = mine.clamp(begin, end) - begin
                tokens.append(decoder.decode_rows(logits, mine, self.prob_bits))
            else:
                mine_here = bounds.clip(begin, end) - begin
                tokens.append(_decoded_rows(decoder, logits, mine_here, self.prob_bits, threads))
        return tokens

    def _grids(self, staged: StagedDecoder) -> torch.Tensor:
        return staged.tokens().cpu()

    def _draw(self, logits: torch.Tensor, places: NDArray[np.int64], seed: int) -> torch.Tensor:
        return sampling.draw(logits, places, seed)

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts, 1)

    def _either(
        self, rows: NDArray[np.bool_], tokens: torch.Tensor, others: torch.Tensor
    ) -> torch.Tensor:
        choice = torch.from_numpy(rows)[:, None].to(tokens.device)
        return torch.where(choice, tokens, others.to(tokens.device))

    def _likeliest(
        self, logits: torch.Tensor, options: NDArray[np.int64], may: NDArray[np.bool_]
    ) -> torch.Tensor:
        mine, free = (
            torch.from_numpy(part).to(logits.device, non_blocking=True) for part in (options, may)
        )
        # Scores are distinct because argmax promises nothing about ties.
        rank = torch.arange(options.shape[2], device=logits.device)
        scores = logits.gather(2, mine).to(torch.int64) * len(rank) - rank
        scores = torch.where(free, scores, torch.iinfo(torch.int64).min)
        best = scores.argmax(2, keepdim=True)
        return mine.gather(2, best)[..., 0].to(torch.int32)


def _stage_maps(
    schedules: Sequence[schedule.Schedule], shapes: Sequence[tuple[int, int]]
) -> list[NDArray[np.int32]]:
    """Return the checked stage maps of grids."""
    return [
        check_stages(schedule.stage_map(name, *shape))
        for name, shape in zip(schedules, shapes, strict=True)
    ]


def _decoded_rows(
    decoder: rans.RansDecoder,
    logits: torch.Tensor,
    rows: NDArray[np.int64],
    prob_bits: int,
    threads: int,
) -> torch.Tensor:
    """Decode on the CPU what ``CudaRansDecoder.decode_rows`` decodes on a device."""
    there, counts = logits[0].cpu(), np.diff(rows)
    symbols = np.zeros((1, len(there)), dtype=np.int32)
    for count in np.unique(counts[counts > 0]):
        streams = np.flatnonzero(counts == count)
        index = rows[streams, None] + np.arange(count)
        found = decoder.decode(there[torch.from_numpy(index)], prob_bits, streams, threads)
        symbols[0, index] = found.numpy()
    return torch.from_numpy(symbols).to(logits.device)
