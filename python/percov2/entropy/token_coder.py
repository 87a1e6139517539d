"""The coder of tokens: schedule, integer model, intervals and rANS.

Encoding takes one pass of the model for all tokens; decoding takes one pass per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.entropy import cdf, rans, sampling, schedule
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.rans import as_array
from percov2.entropy.staging import StagedDecoder, one_pass_residual

__all__ = ["CodedGrids", "TokenCoder", "grid_sides", "refuse_outsiders"]


_LOGITS_AT_ONCE = 2**21
"""Logits per call of the model: they are coded while still in cache."""
_TOKENS_AT_ONCE = 2**14


def grid_sides(tokens: Any) -> tuple[int, int]:
    """Return the sides (h, w) of token grids [B, h, w]. Raise ValueError for another shape."""
    try:
        shape = np.shape(tokens)
    except RuntimeError as error:  # torch's nested tensors have no shape
        raise ValueError("tokens are a tensor without dense data; give a dense one") from error
    if len(shape) != 3:
        raise ValueError(f"tokens have shape {tuple(shape)}; they must be [B, h, w]")
    return int(shape[1]), int(shape[2])


class CodedGrids:
    """The intervals of all tokens of grids, made by ``TokenCoder.code`` or ``code_joined``.

    Args:
        coder: the coder that made them.
        maps: stage maps, one for each grid, or one for all.
        starts, freqs: int32 [B, n], each row in coding order. Rows of smaller grids are padded.
    """

    def __init__(
        self, coder: TokenCoder, maps: Sequence[NDArray[np.int32]], starts: Any, freqs: Any
    ) -> None:
        self._coder, self._starts, self._freqs = coder, starts, freqs
        ends = [np.bincount(stages.reshape(-1)).cumsum() for stages in maps]
        self._ends = ends * len(starts) if len(ends) == 1 else ends

    def __len__(self) -> int:
        return len(self._starts)

    def stage_count(self, row: int) -> int:
        """Return the number of stages of the grid at an index."""
        return len(self._ends[row]) - 1

    def encode(
        self,
        checks: rans.ArrayLike,
        threads: int = 1,
        sent: int | Sequence[int] = 0,
        rows: Sequence[int] | None = None,
    ) -> rans.RansEncoder:
        """Return streams of the grids at the indices ``rows``, or of all grids if it is None.

        The other arguments are those of ``TokenCoder.encode``, but each stream may have its own
        ``sent``.
        """
        chosen = list(range(len(self)) if rows is None else rows)
        each = [sent] * len(chosen) if isinstance(sent, int) else sent
        counts = np.zeros(len(chosen), dtype=np.int64)
        for i, (row, last) in enumerate(zip(chosen, each, strict=True)):
            total = self.stage_count(row)
            if not 0 <= last <= total:
                raise ValueError(f"{last} stages of a schedule that has {total} on this grid")
            counts[i] = self._ends[row][last or total]
        most = int(counts.max(initial=0))
        every = chosen == list(range(len(self)))
        part = slice(None) if every else chosen, slice(most)
        return self._pushed(self._starts[part], self._freqs[part], counts, checks, threads)

    def _pushed(
        self, starts: Any, freqs: Any, counts: NDArray[np.int64], checks: Any, threads: int
    ) -> rans.RansEncoder:
        """Encode the first ``counts`` intervals of each row."""
        encoder = rans.RansEncoder(checks)
        there = np.arange(starts.shape[1]) < counts[:, None]
        encoder.encode(starts[there], freqs[there], counts, self._coder.prob_bits, threads)
        return encoder


class TokenCoder:
    """A coder of token grids with one integer transformer on the CPU.

    The methods take tokens as arrays or tensors and return arrays. ``scheduled`` is the name of a
    schedule, or a stage map int32 [h, w] for an order that no file can name.
    ``percov2.entropy.torch.token_coder`` codes on GPUs; ``open_coder`` opens either coder.

    Args:
        model: the integer transformer.

    >>> from percov2.entropy.transformer_config import TransformerConfig
    >>> config = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=1, hidden=8)
    >>> coder = TokenCoder(IntTransformer.random(config, seed=1))
    >>> grids = np.zeros((1, 2, 3), np.int32)
    >>> encoder = coder.encode(grids, "checkerboard", checks=[7])
    >>> decoder = coder.decoder(*encoder.finish())
    >>> coder.decode(decoder, "checkerboard", 2, 3)
    array([[[0, 0, 0],
            [0, 0, 0]]], dtype=int32)
    >>> decoder.finished([7])
    array([ True])
    """

    coder_name = "cpu"
    joins = False
    """True for coders on GPUs: unequal grids are faster together than one after the other."""

    def __init__(self, model: IntTransformer) -> None:
        self.model = model
        self.prob_bits = cdf.default_prob_bits(model.config.codebook_size)

    @property
    def tokens_at_once(self) -> int:
        """Return the batch size, in tokens, that fills the device and fits its memory."""
        return _TOKENS_AT_ONCE

    # Encoding ------------------------------------------------------------------------------------

    def encode(
        self,
        tokens: Any,
        scheduled: schedule.Schedule,
        checks: rans.ArrayLike,
        threads: int = 1,
        sent: int = 0,
    ) -> rans.RansEncoder:
        """Return an encoder that holds the tokens of each grid as one stream.

        The caller may then push symbols that a decoder will read before the tokens.

        Args:
            tokens: integers [B, h, w] in 0 .. V - 1.
            scheduled: the order of the tokens.
            checks: uint16 [B], the initial states.
            threads: number of threads of the coder. It never changes a byte.
            sent: last stage whose tokens are written; 0 writes all stages.

        Raises:
            ValueError: tokens outside the codebook, wrong checks, a schedule that does not fit, or
                a ``sent`` that the schedule does not have.
            RuntimeError: torch runs the pass and allows reduced precision.
        """
        return self.code(tokens, scheduled, threads).encode(checks, threads, sent)

    def code(self, tokens: Any, scheduled: schedule.Schedule, threads: int = 1) -> CodedGrids:
        """Run the pass over the grids once, so that any number of stages can be written later.

        The arguments and errors are those of ``encode``.
        """
        stages = schedule.stage_map(scheduled, *grid_sides(tokens))
        starts, freqs = self.intervals(tokens, scheduled, threads)
        return CodedGrids(self, [stages], starts, freqs)

    def code_joined(
        self, grids: Sequence[Any], schedules: Sequence[schedule.Schedule]
    ) -> CodedGrids:
        """Run one pass over grids of any sizes and schedules.

        The intervals are those of ``code``. The number of launches does not depend on the number of
        grids.

        Args:
            grids: integers [h, w] in 0 .. V - 1, arrays or tensors on the CPU.
            schedules: the order of the tokens of each grid.

        Raises:
            ValueError, RuntimeError: as for ``encode``.
            NotImplementedError: the compiled program runs the passes.
        """
        raise NotImplementedError("the compiled program passes only equal grids together")

    def intervals(
        self, tokens: Any, scheduled: schedule.Schedule, threads: int = 1
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the intervals of all tokens at ``prob_bits``: (starts, freqs), int32 [B, h * w].

        They are in coding order (``schedule.order``). The arguments and errors are those of
        ``encode``.
        """
        residual, symbols = self._passed(tokens, scheduled)
        starts = np.empty(symbols.shape, dtype=np.int32)
        freqs = np.empty(symbols.shape, dtype=np.int32)
        for part, logits in self._logits(residual):
            starts[:, part], freqs[:, part] = rans.intervals(
                logits, symbols[:, part], self.prob_bits, threads
            )
        return starts, freqs

    def _passed(self, tokens: Any, scheduled: schedule.Schedule) -> tuple[Any, Any]:
        """Return the residual of all tokens after the pass, and the tokens, in coding order."""
        stages = schedule.stage_map(scheduled, *grid_sides(tokens))
        tokens = as_array(tokens, "tokens")
        residual = one_pass_residual(self.model, tokens, stages)
        coding = schedule.order(stages)
        return residual, tokens.reshape(len(tokens), stages.size)[:, coding].astype(np.int32)

    def _logits(self, residual: Any) -> Iterator[tuple[slice, Any]]:
        """Yield slices of positions and their logits from a residual int32 [B, n, dim]."""
        batch, count = residual.shape[:2]
        step = max(1, self._logits_at_once() // max(1, batch * self.model.config.codebook_size))
        for begin in range(0, count, step):
            part = slice(begin, begin + step)
            yield part, self.model.logits(residual[:, part])

    def _logits_at_once(self) -> int:
        return _LOGITS_AT_ONCE

    # Decoding ------------------------------------------------------------------------------------

    def decoder(
        self,
        buffer: bytes | NDArray[np.uint8],
        offsets: NDArray[np.int64],
        states: NDArray[np.uint32] | None = None,
        positions: NDArray[np.int64] | None = None,
    ) -> Any:
        """Return a decoder of streams for ``decode``.

        The arguments are those of ``rans.RansDecoder``.
        """
        return rans.RansDecoder(buffer, offsets, states, positions)

    def decode(
        self,
        decoder: Any,
        scheduled: schedule.Schedule,
        height: int,
        width: int,
        on_stage: Callable[[int], None] | None = None,
        threads: int = 1,
        sent: int = 0,
        seed: int = 0,
    ) -> Any:
        """Decode the tokens of all streams of ``decoder``. Return int32 [B, height, width].

        Args:
            decoder: made by the method ``decoder``.
            scheduled: the order of the tokens.
            height, width: sides of the grids, in tokens.
            on_stage: called before each stage that is read from the streams, with the number of
                tokens per stream still to be read. An exception from it ends the decoding.
            threads: number of threads of the coder.
            sent: last stage that the streams hold. Later stages are drawn from the model; 0 means
                that the streams hold all stages.
            seed: seed of the draws (``sampling.draw``).

        Raises:
            ValueError: a wrong schedule, ``sent`` or seed, or a grid that is too large.
        """
        stages = schedule.stage_map(scheduled, height, width)
        last = self._sent(stages, sent)
        absent = int(np.count_nonzero(stages > last))
        staged = StagedDecoder(self.model, stages, len(decoder.states))
        for stage in range(1, int(stages.max()) + 1):
            if stage <= last:
                if on_stage is not None:
                    on_stage(staged.remaining - absent)
                staged.accept(self._read(decoder, staged.residual(), threads))
            else:
                staged.accept(self._drawn(staged.residual(), stages, stage, seed))
        return self._grids(staged)

    def decode_joined(
        self,
        decoder: Any,
        schedules: Sequence[schedule.Schedule],
        shapes: Sequence[tuple[int, int]],
        on_stage: Callable[[NDArray[np.int64]], None] | None = None,
        threads: int = 1,
        sent: Sequence[int] = (),
        seeds: Sequence[int] = (),
    ) -> list[Any]:
        """Decode the tokens of all streams of ``decoder``, which have grids of any sizes.

        The tokens are those of ``decode``. The number of launches depends on the largest number of
        stages, but not on the number of grids.

        Args:
            decoder: made by the method ``decoder``.
            schedules: the order of the tokens of each grid.
            shapes: sides (h, w) of each grid, in tokens.
            on_stage: as for ``decode``, but with a number for each stream, int64 [B].
            threads: number of threads of the coder.
            sent: as for ``decode``, but one for each stream. Empty means all stages.
            seeds: seed of the draws for each stream, needed only with ``sent``.

        Returns:
            One int32 [h, w] for each stream, on the CPU.

        Raises:
            ValueError: a wrong schedule, ``sent`` or seed, or a grid that is too large.
            NotImplementedError: the compiled program runs the passes.
        """
        raise NotImplementedError("the compiled program passes only equal grids together")

    def decode_cut(
        self,
        decoder: Any,
        scheduled: schedule.Schedule,
        height: int,
        width: int,
        threads: int = 1,
        sent: int = 0,
        seed: int = 0,
    ) -> tuple[Any, NDArray[np.int64]]:
        """Decode the intact stages of truncated streams, and draw the other stages.

        A symbol is intact if bytes are left or the state is at least 2^23. A stage is taken if all
        its symbols and all earlier stages are intact. The arguments and errors are those of
        ``decode``.

        Returns:
            The tokens, int32 [B, height, width], and the number of stages taken per grid, int64
            [B].
        """
        stages = schedule.stage_map(scheduled, height, width)
        last = self._sent(stages, sent)
        staged = StagedDecoder(self.model, stages, len(decoder.states))
        taken = np.zeros(len(decoder.states), dtype=np.int64)
        for stage in range(1, int(stages.max()) + 1):
            residual = staged.residual()
            intact = np.zeros(len(taken), dtype=bool)
            if stage <= last and (taken == stage - 1).any():
                read = []
                if residual.shape[1] > 1:
                    read.append(self._read(decoder, residual[:, :-1], threads))
                intact = (taken == stage - 1) & ~decoder.exhausted
                read.append(self._read(decoder, residual[:, -1:], threads))
                tokens = self._joined(read)
            if not intact.all():
                drawn = self._drawn(residual, stages, stage, seed)
                tokens = self._either(intact, tokens, drawn) if intact.any() else drawn
            taken[intact] = stage
            staged.accept(tokens)
        return self._grids(staged), taken

    def _sent(self, stages: NDArray[np.int32], sent: int) -> int:
        """Return the last stage in the streams. Raise ValueError if the schedule lacks it."""
        count = int(stages.max())
        if not 0 <= sent <= count:
            raise ValueError(f"{sent} stages of a schedule that has {count} on this grid")
        return sent or count

    def _grids(self, staged: StagedDecoder) -> Any:
        return staged.tokens()

    def _read(self, decoder: Any, residual: Any, threads: int) -> Any:
        """Decode the next tokens [B, n] of every stream, given residuals int32 [B, n, dim]."""
        return self._joined(
            [
                decoder.decode(logits, self.prob_bits, threads=threads)
                for _, logits in self._logits(residual)
            ]
        )

    def _drawn(self, residual: Any, stages: NDArray[np.int32], stage: int, seed: int) -> Any:
        """Draw the tokens of a stage: int32 [B, n]."""
        places = np.flatnonzero(stages == stage)
        return self._joined(
            [self._draw(logits, places[part], seed) for part, logits in self._logits(residual)]
        )

    def _draw(self, logits: Any, places: NDArray[np.int64], seed: int) -> Any:
        return sampling.draw(logits, places, seed)

    def _joined(self, parts: list[Any]) -> Any:
        return np.concatenate(parts, axis=1)

    def _either(self, rows: NDArray[np.bool_], tokens: Any, others: Any) -> Any:
        return np.where(rows[:, None], tokens, others)

    # Choosing ------------------------------------------------------------------------------------

    def choose(self, candidates: Any, allowed: Any, name: str) -> Any:
        """Return the likeliest allowed candidate at every place, given the choices so far.

        Of several tokens that serve an encoder about equally well, the likeliest costs the fewest
        bits. This takes one pass per stage, as decoding does. It ignores the effect of a choice on
        later stages.

        Args:
            candidates: tokens, int32 [B, h, w, K]. Of equally likely candidates, the first wins.
            allowed: bool [B, h, w, K]. The first candidate of every place must be allowed.
            name: name of the schedule.

        Returns:
            The chosen tokens, int32 [B, h, w].

        Raises:
            ValueError: the shapes differ, the first candidate of a place is not allowed, a token
                lies outside the codebook, or the schedule is unknown.
        """
        options = rans.integers(candidates, np.int64, "candidates")
        open_ = as_array(allowed, "allowed")
        if options.ndim != 4 or options.shape != open_.shape:
            raise ValueError(
                f"candidates {options.shape} and allowed {open_.shape} must both be [B, h, w, K]"
            )
        if not open_[..., 0].all():
            raise ValueError("the first candidate of every place must be allowed")
        refuse_outsiders(options, self.model.config.codebook_size)
        stages = schedule.stages(name, *options.shape[1:3])
        flat = options.reshape(len(options), stages.size, options.shape[3])
        may = open_.reshape(flat.shape)
        staged = StagedDecoder(self.model, stages, len(flat))
        for stage in range(1, int(stages.max()) + 1):
            here = np.flatnonzero(stages == stage)
            parts = []
            for part, logits in self._logits(staged.residual()):
                places = here[part]
                parts.append(self._likeliest(logits, flat[:, places], may[:, places]))
            staged.accept(self._joined(parts))
        return self._grids(staged)

    def _likeliest(self, logits: Any, options: NDArray[np.int64], may: NDArray[np.bool_]) -> Any:
        """Return the likeliest allowed option of every place: [B, n, K] -> int32 [B, n]."""
        # Scores are distinct because argmax promises nothing about ties.
        rank = np.arange(options.shape[2])
        scores = np.take_along_axis(logits.astype(np.int64), options, 2) * len(rank) - rank
        best = np.where(may, scores, np.iinfo(np.int64).min).argmax(2)[..., None]
        return np.take_along_axis(options, best, 2)[..., 0].astype(np.int32)


def refuse_outsiders(symbols: Any, codebook_size: int) -> None:
    """Raise ValueError if a symbol is outside the codebook. This waits for the symbols' device."""
    low, high = int(symbols.min()), int(symbols.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"tokens range from {low} to {high}; the codebook has {codebook_size} entries"
        )
