"""Tokens to intervals and back: schedule x integer model x quantizer x rANS.

Intervals of all tokens come from one pass; decoding takes one pass per stage. The coder sees
integers only, and the model never sees bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy import cdf, intmath, rans, rans_cuda, sampling, schedule
from percov2.entropy.coder_proof import prove_coder
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.stage_pass import StagedDecoder, one_pass_residual

_LOGITS_AT_ONCE = 2**21
"""Logits made at a time: they are coded while they are still in cache."""
_LOGITS_AT_ONCE_FUSED = 2**28
"""The same where one kernel codes them: 512 MiB, one launch for 256 images of 1024 tokens."""

_TOKENS_AT_ONCE = {"cpu": 2**14, "cuda": 2**18}
_BYTES_AT_ONCE = 2**32
"""What a batch may need on a CUDA device besides its logits."""

CODERS = ("cpu", "cuda")


def default_coder(device: torch.device) -> str:
    """What codes the tokens of a model on ``device`` unless its user says otherwise.

    "cuda" on CUDA devices, or "cpu" with a warning that says why it cannot be; "cpu" elsewhere.
    Both write the same bytes.
    """
    if device.type != "cuda":
        return "cpu"
    if not rans.cuda_built():
        reason = "percov2 was built without CUDA, and docs/gpu.md says how to build with it"
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


class CodedGrids:
    """Grids of one size after the one pass: the intervals of all their tokens.

    Made by ``TokenCoder.code``. Intervals stay where streams are written: in host memory, or on the
    device with ``coder_name`` "cuda".
    """

    def __init__(
        self,
        coder: TokenCoder,
        stages: NDArray[np.int32],
        starts: Any,
        freqs: Any,
        symbols: torch.Tensor | None = None,
    ) -> None:
        self._coder, self._stages = coder, stages
        self._starts, self._freqs, self._symbols = starts, freqs, symbols
        self.stage_count = int(stages.max())

    def __len__(self) -> int:
        return len(self._starts)

    def encoder(
        self,
        checks: rans.ArrayLike,
        threads: int = 1,
        sent: int = 0,
        rows: Sequence[int] | None = None,
    ) -> rans.RansEncoder:
        """Return streams of the grids ``rows`` (all if None); else as ``TokenCoder.encoder``."""
        if not 0 <= sent <= self.stage_count:
            raise ValueError(
                f"{sent} stages of a schedule that has {self.stage_count} on this grid"
            )
        count = int(np.count_nonzero(self._stages <= (sent or self.stage_count)))
        every = rows is None or list(rows) == list(range(len(self)))
        chosen = slice(None) if every else list(rows or ())
        starts, freqs = self._starts[chosen, :count], self._freqs[chosen, :count]
        bits = self._coder.prob_bits
        if self._symbols is None:
            encoder = rans.RansEncoder(checks)
            counts = np.full(len(starts), count, dtype=np.int64)
            encoder.push(starts.ravel(), freqs.ravel(), counts, bits, threads)
            return encoder
        states = self._coder.placed_checks(checks)
        streams = rans_cuda.encode(starts.contiguous(), freqs.contiguous(), states, bits)
        try:
            return rans.RansEncoder.resumed(*streams.to_host())
        except ValueError:
            self._coder._refuse_outsiders(self._symbols)
            raise


class TokenCoder:
    """Codes token grids with one integer transformer.

    ``scheduled`` is a schedule's name, or a stage map int32 [h, w] for orders that no file knows.

    Args:
        model: the integer transformer; its device decides where the passes run.
        coder: "cpu" or "cuda", where the streams are written and read; by default what
            ``default_coder`` says. ``coder_name`` tells which it became.

    Raises:
        ValueError: an unknown coder.
        RuntimeError: coding on the model's device gives other results than on the CPU.

    >>> from percov2.entropy.transformer_config import TransformerConfig
    >>> config = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=1, hidden=8)
    >>> coder = TokenCoder(IntTransformer.random(config, seed=1))
    >>> grids = torch.zeros(1, 2, 3, dtype=torch.int32)
    >>> encoder = coder.encoder(grids, "checkerboard", checks=[7])
    >>> decoder = coder.decoder(*encoder.finish())
    >>> coder.decode(decoder, "checkerboard", 2, 3)
    tensor([[[0, 0, 0],
             [0, 0, 0]]], dtype=torch.int32)
    >>> decoder.finished([7])
    array([ True])
    """

    def __init__(self, model: IntTransformer, coder: str | None = None) -> None:
        if coder is not None and coder not in CODERS:
            raise ValueError(f"coder is {coder!r}; it must be one of {CODERS}")
        self.model = model
        self.prob_bits = cdf.default_prob_bits(model.config.codebook_size)
        self.coder_name = coder or default_coder(model.device)
        if model.device.type == "cuda":
            prove_coder(model.device, model.config.codebook_size, self.coder_name == "cuda")

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a batch that keeps the device busy and fits its memory (docs/gpu.md)."""
        if self.model.device.type != "cuda":
            return _TOKENS_AT_ONCE["cpu"]
        config = self.model.config
        # Residuals of four bytes, hidden activations, and the cache of staged decoding.
        bytes_per_token = 16 * config.dim + config.hidden + 2 * config.layers * config.inner
        return min(_TOKENS_AT_ONCE["cuda"], _BYTES_AT_ONCE // bytes_per_token)

    def encoder(
        self,
        tokens: torch.Tensor,
        scheduled: schedule.Schedule,
        checks: rans.ArrayLike,
        threads: int = 1,
        sent: int = 0,
    ) -> rans.RansEncoder:
        """Streams that hold the tokens of each grid, ready for what precedes them in a file.

        tokens int32 [B, h, w] on any device; checks uint16 [B], the initial states; sent: only the
        tokens of stages 1 .. sent, 0 for all. Wherever the streams are written, the host waits for
        a GPU once: for intervals or for bytes. Raises ValueError for tokens outside the codebook,
        wrong checks, stages or a schedule that does not fit, RuntimeError where torch is set to
        reduced precision.
        """
        if self.coder_name == "cuda":
            # Before the pass: CUDA may finish a stream before it takes pageable memory.
            checks = self.placed_checks(checks)
        return self.code(tokens, scheduled, threads).encoder(checks, threads, sent)

    def placed_checks(self, checks: Any) -> torch.Tensor:
        """Return checks as int32 [B] on the model's device, where they may lie already."""
        if not isinstance(checks, torch.Tensor):
            checks = torch.from_numpy(np.array(checks, dtype=np.int32))
        return checks.to(self.model.device, non_blocking=True)

    def code(
        self, tokens: torch.Tensor, scheduled: schedule.Schedule, threads: int = 1
    ) -> CodedGrids:
        """Run the one pass over grids, of which any stages can be written then.

        Arguments and errors as for ``encoder``.
        """
        stages = schedule.stage_map(scheduled, *tokens.shape[1:])
        if self.coder_name == "cpu":
            starts, freqs = self.intervals(tokens, scheduled, threads)
            return CodedGrids(self, stages, starts, freqs)
        residual, symbols = self._passed(tokens, scheduled)
        starts, freqs = self._intervals_on_device(residual, symbols)
        return CodedGrids(self, stages, starts, freqs, symbols)

    def decoder(
        self,
        buffer: bytes | NDArray[np.uint8],
        offsets: NDArray[np.int64],
        states: NDArray[np.uint32] | None = None,
        positions: NDArray[np.int64] | None = None,
    ) -> rans.RansDecoder | rans_cuda.CudaRansDecoder:
        """What ``decode`` reads: streams as of ``RansEncoder.finish``, or resumed ones.

        Arguments and errors as for ``rans.RansDecoder``.
        """
        if self.coder_name == "cpu":
            return rans.RansDecoder(buffer, offsets, states, positions)
        return rans_cuda.CudaRansDecoder(
            torch.from_numpy(np.frombuffer(buffer, dtype=np.uint8).copy()),
            torch.from_numpy(np.asarray(offsets, dtype=np.int64)),
            self.model.device,
            None if states is None else torch.from_numpy(states.astype(np.int32)),
            None if positions is None else torch.from_numpy(np.asarray(positions, dtype=np.int64)),
        )

    def intervals(
        self, tokens: torch.Tensor, scheduled: schedule.Schedule, threads: int = 1
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Intervals of every token, at ``prob_bits``: (starts, freqs), int32 [B, N].

        tokens int32 [B, h, w] on any device; N = h * w in coding order (``schedule.order``). On a
        GPU the host waits once, for both results. Raises ValueError for tokens outside the codebook
        or a schedule that does not fit, RuntimeError where torch is set to reduced precision.
        """
        residual, symbols = self._passed(tokens, scheduled)
        if residual.device.type == "cpu":
            return self._intervals_on_cpu(residual, symbols, threads)
        starts, freqs = self._intervals_on_device(residual, symbols).cpu().numpy()
        if not freqs.all():
            self._refuse_outsiders(symbols)
        return starts, freqs

    def _passed(
        self, tokens: torch.Tensor, scheduled: schedule.Schedule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual of all tokens after the one pass, and the tokens: both in coding order."""
        stages = schedule.stage_map(scheduled, *tokens.shape[1:])
        tokens = tokens.to(self.model.device, non_blocking=self.model.device.type != "cpu")
        # Before the pass: CUDA may finish a stream before it takes pageable memory.
        coding = torch.from_numpy(schedule.order(stages)).to(tokens.device, non_blocking=True)
        residual = one_pass_residual(self.model, tokens, stages)
        return residual, tokens.flatten(1)[:, coding].to(torch.int32)

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

    def _intervals_on_device(self, residual: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """Starts and freqs, int32 [2, B, N], for which nothing waits.

        So symbols outside the codebook are not refused here: their freq is 0.
        """
        parts = [
            cdf.marked_intervals(logits, symbols[:, part], self.prob_bits)
            for part, logits in self._logits(residual)
        ]
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _refuse_outsiders(self, symbols: torch.Tensor) -> None:
        """ValueError if a symbol lies outside the codebook. Waits for the device."""
        low, high = int(symbols.min()), int(symbols.max())
        if low < 0 or high >= self.model.config.codebook_size:
            raise ValueError(
                f"tokens range from {low} to {high}; "
                f"the codebook has {self.model.config.codebook_size} entries"
            )

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
        decoder: rans.RansDecoder | rans_cuda.CudaRansDecoder,
        scheduled: schedule.Schedule,
        height: int,
        width: int,
        on_stage: Callable[[int], None] | None = None,
        threads: int = 1,
        sent: int = 0,
        seed: int = 0,
    ) -> torch.Tensor:
        """Decode the tokens of all streams of ``decoder``: int32 [B, height, width] on the CPU.

        With a CudaRansDecoder tokens stay on the device until they are complete.

        ``on_stage(remaining)`` is called before each stage in the streams with the number of their
        tokens that are still to come; what it raises ends the decoding. Tokens of stages above
        ``sent``, unless it is 0, are drawn from the model with ``seed`` (``sampling.draw``). Raises
        ValueError for a schedule, stages or seed that do not fit, or a grid that is too large.
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
        return staged.tokens().cpu()

    def decode_cut(
        self,
        decoder: rans.RansDecoder | rans_cuda.CudaRansDecoder,
        scheduled: schedule.Schedule,
        height: int,
        width: int,
        threads: int = 1,
        sent: int = 0,
        seed: int = 0,
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """What the beginnings of streams still say, and draws for the rest.

        A symbol read with bytes left, or a state of at least 2^23, is that of the whole stream. A
        stage is taken if that is true of all its symbols and of every stage before it. Arguments
        and errors as for ``decode``.

        Returns:
            Tokens int32 [B, height, width] on the CPU, and how many stages of each grid were taken,
            int64 [B].
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
                tokens = torch.cat(read, 1)
            if not intact.all():
                drawn = self._drawn(residual, stages, stage, seed)
                if intact.any():
                    choice = torch.from_numpy(intact)[:, None].to(tokens.device)
                    drawn = torch.where(choice, tokens, drawn.to(tokens.device))
                tokens = drawn
            taken[intact] = stage
            staged.accept(tokens)
        return staged.tokens().cpu(), taken

    def _sent(self, stages: NDArray[np.int32], sent: int) -> int:
        """The last stage that streams hold; ValueError for one that the schedule lacks."""
        count = int(stages.max())
        if not 0 <= sent <= count:
            raise ValueError(f"{sent} stages of a schedule that has {count} on this grid")
        return sent or count

    def _read(
        self,
        decoder: rans.RansDecoder | rans_cuda.CudaRansDecoder,
        residual: torch.Tensor,
        threads: int,
    ) -> torch.Tensor:
        """The next tokens of every stream, from residuals int32 [B, n, dim]: int32 [B, n]."""
        parts: list[torch.Tensor] = []
        for _, logits in self._logits(residual):
            if isinstance(decoder, rans.RansDecoder):
                coded = decoder.decode_logits(logits, self.prob_bits, threads=threads)
                parts.append(torch.from_numpy(coded))
            else:
                parts.append(decoder.decode_logits(logits, self.prob_bits))
        return torch.cat(parts, 1)

    def _drawn(
        self, residual: torch.Tensor, stages: NDArray[np.int32], stage: int, seed: int
    ) -> torch.Tensor:
        """Tokens of a stage that no stream holds: int32 [B, n]."""
        places = np.flatnonzero(stages == stage)
        parts = [
            sampling.draw(logits, places[part], seed) for part, logits in self._logits(residual)
        ]
        return torch.cat(parts, 1)

    def choose(self, candidates: torch.Tensor, allowed: torch.Tensor, name: str) -> torch.Tensor:
        """The likeliest allowed candidate at every place, given those chosen in earlier stages.

        An encoder may write any token; of several that serve it about as well the likeliest costs
        fewest bits. Takes one pass per stage, as decoding does; what a choice does to later stages
        is not looked at.

        Args:
            candidates: tokens int32 [B, h, w, K], the preferred one first: it wins a tie.
            allowed: bool, the same shape; the first of every place is.
            name: of the schedule.

        Returns:
            Tokens int32 [B, h, w] on the CPU.

        Raises:
            ValueError: shapes that differ, a place without an allowed candidate, tokens outside the
                codebook, or an unknown schedule.
        """
        if candidates.ndim != 4 or candidates.shape != allowed.shape:
            raise ValueError(
                f"candidates {tuple(candidates.shape)} and allowed {tuple(allowed.shape)} must "
                "both be [B, h, w, K]"
            )
        if not allowed[..., 0].all():
            raise ValueError("the first candidate of every place must be allowed")
        self._refuse_outsiders(candidates)
        device = self.model.device
        stages = schedule.stages(name, *candidates.shape[1:3])
        stage_of = torch.from_numpy(stages.reshape(-1).copy())
        flat, may = (x.flatten(1, 2).to(device) for x in (candidates, allowed))
        rank = torch.arange(candidates.shape[3], dtype=torch.int32, device=device)
        staged = StagedDecoder(self.model, stages, len(candidates))
        stage = 0
        while staged.remaining:
            stage += 1
            here = (stage_of == stage).nonzero().flatten().to(device)
            options, open_ = flat[:, here], may[:, here]
            parts = []
            for part, logits in self._logits(staged.residual()):
                # Distinct scores: argmax promises nothing about ties.
                scores = logits.gather(2, options[:, part].long()).to(torch.int32)
                scores = scores * len(rank) - rank
                scores[~open_[:, part]] = torch.iinfo(torch.int32).min
                parts.append(options[:, part].gather(2, scores.argmax(2, keepdim=True)).squeeze(2))
            staged.accept(torch.cat(parts, 1).to(torch.int32))
        return staged.tokens().cpu()
