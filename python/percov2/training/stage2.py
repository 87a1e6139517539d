"""Stage 2, which trains the entropy model on the frozen tokens of stage 1.

Crops of token maps are coded in many orders: the format's schedules, and random orders with random
group sizes. Thus one set of weights serves every schedule. The first part of the training is in
float. Then weights and activations are rounded as in the integer program, with straight-through
gradients. At the end, the integer form is exported, and both forms are measured on held-out maps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from percov2.entropy.cdf import MAX_CODEBOOK, MIN_CODEBOOK
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.schedule import DEFAULT_SCHEDULE, SCHEDULES, stages
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.torch.export import export
from percov2.entropy.torch.quantization import ActivationRange
from percov2.entropy.torch.transformer import Crop, TokenBatch, TokenTransformer, crop_batch
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.visibility import size_class
from percov2.files import read_arrays
from percov2.training.loop import LoopConfig, load_averaged, train
from percov2.training.ranges import check_ranges
from percov2.training.stage import ALONE, Figures, Place, TrainingStage, append_row

__all__ = ["EntropyConfig", "EntropyStage", "RoundedStage", "TokenMaps", "evenly_spread"]
__all__ += ["integer_bits", "random_stages", "train_entropy", "trained_model"]

_MAX_HELD_OUT = 48
_OBSERVE_EVERY = 4
_MAX_SIDE = 8192
Shape = tuple[int, int]
Map = NDArray[np.int32]


@dataclass(frozen=True)
class EntropyConfig:
    """The configuration of the entropy phase.

    Raises:
        ValueError: a number is outside its range, or there is no shape.
    """

    model: dict = field(default_factory=dict)  # ``TransformerConfig`` without codebook_size
    # Crop heights and widths in tokens; a step draws one shape.
    shapes: tuple[Shape, ...] = ((16, 16), (14, 14), (12, 20), (20, 28), (24, 32))
    tokens_per_step: int = 4096  # approximate number of tokens in a batch, over all processes
    real_orders: float = 0.6  # share of crops with a schedule of the format; others are random
    default_orders: float = 0.6  # share of the default schedule among these crops
    round_from: float = 0.6  # share of the steps before rounding starts
    observe_until: float = 0.85  # share of the steps before the scales are fixed

    def __post_init__(self) -> None:
        shares = ("real_orders", "default_orders", "round_from", "observe_until")
        check_ranges(self, tokens_per_step=(1, 1 << 24), **dict.fromkeys(shares, (0, 1)))
        sides = [side for shape in self.shapes for side in shape]
        if not sides or not 1 <= min(sides) <= max(sides) <= _MAX_SIDE:
            raise ValueError(f"shapes must be pairs of 1 to {_MAX_SIDE}, not {self.shapes}")


def _read_maps(path: Path) -> tuple[int, list[tuple[Map, bool]]]:
    """Return the codebook size of a file, and its token maps with their held-out flags."""
    stored = read_arrays(path)
    count = sum(name.startswith("tokens_") for name in stored)
    for name in ("codebook_size", "held_out", *(f"tokens_{i}" for i in range(count))):
        if name not in stored:
            raise ValueError(f"{path} has no {name}; make it with `percov2 train tokens`")
    size, held = stored["codebook_size"], stored["held_out"]
    if size.dtype.kind not in "iu" or size.ndim or not MIN_CODEBOOK <= size <= MAX_CODEBOOK:
        wanted = f"a whole number from {MIN_CODEBOOK} to {MAX_CODEBOOK}"
        raise ValueError(f"{path}: codebook_size must be {wanted}, not {size.tolist()!r:.60}")
    # Without maps, numpy stores no bool.
    if held.shape != (count,) or (count and held.dtype != np.bool_):
        found = f"held_out is {held.dtype} {list(held.shape)}"
        raise ValueError(f"{path} has {count} token maps, but {found} instead of bool [{count}]")
    maps = []
    for i in range(count):
        tokens = stored[f"tokens_{i}"]
        whole = tokens.dtype.kind in "iu" and tokens.ndim == 2 and tokens.size > 0
        if not whole or not 0 <= tokens.min() <= tokens.max() < size:
            found = f"{path}: tokens_{i}, {tokens.dtype} {list(tokens.shape)},"
            raise ValueError(f"{found} must be whole numbers [h, w], 0 or above and below {size}")
        maps.append(tokens.astype(np.int32))
    return int(size), list(zip(maps, held.tolist(), strict=True))


def evenly_spread(held_out: list[Any]) -> list[Any]:
    """Return at most 48 of the held-out items, evenly spaced.

    Neighbouring items come from the same shard.
    """
    return held_out[:: max(1, len(held_out) // _MAX_HELD_OUT)][:_MAX_HELD_OUT]


class TokenMaps:
    """Token maps of photos, made by ``percov2 train tokens``.

    Args:
        path: ``.npz`` file with ``tokens_<i>`` integers [h, w], ``held_out`` bool [maps] and
            ``codebook_size``, or a folder of such files.
        order: a function from a schedule's name, rows and columns to a stage map, int32 [h, w].

    Attributes:
        maps: maps to train on.
        held_out: at most 48 of the held-out maps.

    Raises:
        ValueError: there is no map to train on or no held-out map, a token lies outside the
            codebook, or files have different codebook sizes.
    """

    def __init__(self, path: Path, order: Callable[[str, int, int], Map] = stages) -> None:
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        stored = [_read_maps(file) for file in files]
        if not stored:
            raise ValueError(f"{path} contains no .npz files of `percov2 train tokens`")
        codebooks = {size for size, _ in stored}
        if len(codebooks) != 1:
            raise ValueError(
                f"{path} must contain maps of one codebook, not of {sorted(codebooks)}"
            )
        self.codebook_size = codebooks.pop()
        self.maps = [tokens for _, part in stored for tokens, held in part if not held]
        others = [tokens for _, part in stored for tokens, held in part if held]
        self.held_out = evenly_spread(others)
        if not self.maps or not self.held_out:
            found = f"{len(self.maps)} maps to train on and {len(others)} held out"
            raise ValueError(f"{path} holds {found}; both are needed")
        self.stages = cache(order)

    def counts(self) -> NDArray[np.int64]:
        """Return the number of times that each token occurs in training, int64 [V]."""
        every = np.concatenate([tokens.reshape(-1) for tokens in self.maps])
        return np.bincount(every, minlength=self.codebook_size)

    def size_classes(self) -> tuple[set[int], set[int]]:
        """Return the size classes of the training maps' heights and widths."""
        shapes = {tokens.shape for tokens in self.maps}
        return {size_class(h) for h, _ in shapes}, {size_class(w) for _, w in shapes}

    def draw(
        self, generator: Generator, shape: Shape, config: EntropyConfig, place: Place = ALONE
    ) -> TokenBatch:
        """Return this process's part of a batch of crops of ``shape``.

        Crops are smaller if no map is that large. The probability of a map is proportional to its
        area, so that all tokens are about equally likely.
        """
        height = min(shape[0], max(tokens.shape[0] for tokens in self.maps))
        fitting = [t for t in self.maps if t.shape[0] >= height]
        width = min(shape[1], max(tokens.shape[1] for tokens in fitting))
        fitting = [t for t in fitting if t.shape[1] >= width]
        area = np.array([tokens.size for tokens in fitting], dtype=np.float64)
        count = max(1, round(config.tokens_per_step / (height * width)))
        count += -count % place.processes  # equal parts: gradients are averaged over processes
        crops = []
        for pick in generator.choice(len(fitting), size=count, p=area / area.sum()):
            tokens = fitting[pick]
            order = self._order(generator, config, *tokens.shape)
            top = int(generator.integers(tokens.shape[0] - height + 1))
            left = int(generator.integers(tokens.shape[1] - width + 1))
            crops.append(Crop(tokens, order, top, left))
        return crop_batch(crops[place.process :: place.processes], height, width)

    def _order(self, generator: Generator, config: EntropyConfig, height: int, width: int) -> Map:
        """Draw the stages of a whole map, from a schedule of the format or a random order."""
        if generator.random() >= config.real_orders:
            return random_stages(generator, height, width)
        default = generator.random() < config.default_orders
        name = DEFAULT_SCHEDULE if default else str(generator.choice(SCHEDULES))
        return self.stages(name, height, width)


def random_stages(generator: Generator, height: int, width: int) -> Map:
    """Draw a random order, int32 [height, width], in groups that grow by a power law."""
    size = height * width
    groups = min(size, int(np.exp(generator.uniform(np.log(2), np.log(40)))))
    power = generator.uniform(0.8, 3.0)
    ends = np.maximum(1, size * (np.arange(1, groups + 1) / groups) ** power)
    stage = np.searchsorted(ends, np.arange(1, size + 1) - 0.5) + 1
    result = np.empty(size, dtype=np.int32)
    result[generator.permutation(size)] = np.minimum(stage, groups)
    return result.reshape(height, width)


class RoundedStage(TrainingStage):
    """The base class of stages whose token transformer is rounded in the later part of a run.

    Args:
        config: settings with ``model``, ``round_from`` and ``observe_until``.
        counts: number of times that each token occurs in training, int64 [V].
    """

    whole_batches = True

    def __init__(self, config: Any, counts: NDArray[np.int64]) -> None:
        super().__init__()
        self.config = config
        if "codebook_size" in config.model:
            raise ValueError("model must not have codebook_size, which is that of the data")
        sizes = TransformerConfig.of({**config.model, "codebook_size": len(counts)})
        self.transformer = TokenTransformer(sizes)
        self.transformer.set_frequencies(torch.from_numpy(counts))

    def start_step(self, step: int, total: int) -> None:
        self.transformer.quantized = step >= self.config.round_from * total
        observed = step < self.config.observe_until * total
        self.transformer.observing = observed and step % _OBSERVE_EVERY == 0

    def precision(self) -> torch.autocast:
        """Return the transformer's autocast: bfloat16 in a bf16 run until rounding starts."""
        device = self.place.device.type
        # bfloat16 has 8 bits, so additional rounding to 8 bits would train for other arithmetic.
        allowed = torch.is_autocast_enabled(device) and not self.transformer.quantized
        return torch.autocast(device, dtype=torch.bfloat16, enabled=allowed)

    def after_step(self) -> None:
        """Set the magnitudes of activations to their maxima over all processes."""
        if self.place.processes > 1 and self.transformer.observing:
            seen = [m.amax for m in self.modules() if isinstance(m, ActivationRange)]
            largest = torch.cat(seen)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            for amax, value in zip(seen, largest.split([len(m) for m in seen]), strict=True):
                amax.copy_(value)


class EntropyStage(RoundedStage):
    """The stage that trains the transformer on the bits per token."""

    tables = ("held_out.csv",)

    def __init__(self, config: EntropyConfig, data: TokenMaps) -> None:
        super().__init__(config, data.counts())
        self.data = data

    def forward(self, generator: Generator) -> tuple[Tensor, Figures]:
        shape = self.config.shapes[int(generator.integers(len(self.config.shapes)))]
        loss = self._bits(self.data.draw(generator, shape, self.config, self.place))
        return loss, {"bits": loss.detach()}

    def _bits(self, batch: TokenBatch) -> Tensor:
        """Return the mean bits per token."""
        batch = batch.to(self.place.device)
        with self.precision():
            logits = self.transformer(batch)
        nats = functional.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten())
        return nats / math.log(2.0)

    @torch.no_grad()
    def held_out_bits(self, schedule: str, quantized: bool) -> float:
        """Return the bits per token of held-out maps, in the rounded form if ``quantized``."""
        transformer = self.transformer
        modes = transformer.quantized, transformer.observing
        transformer.quantized, transformer.observing = quantized, False
        bits = tokens = 0.0
        for grid in self.data.held_out:
            order = self.data.stages(schedule, *grid.shape)
            batch = crop_batch([Crop(grid, order)], *grid.shape)
            bits += float(self._bits(batch)) * grid.size
            tokens += grid.size
        transformer.quantized, transformer.observing = modes
        return bits / tokens

    def draw_samples(self, folder: Path, step: int) -> None:
        """Append the bits per token of the held-out maps to held_out.csv."""
        bits = self.held_out_bits(DEFAULT_SCHEDULE, self.transformer.quantized)
        append_row(folder / "held_out.csv", {"step": step, "bits": f"{bits:.5f}"})


def integer_bits(coder: TokenCoder, maps: list[Map], schedule: str) -> float:
    """Return the bits per token of whole maps, computed from the coded intervals."""
    bits = tokens = 0.0
    for grid in maps:
        _, freqs = coder.intervals(grid[None], schedule)
        bits += float((coder.prob_bits - np.log2(freqs)).sum())
        tokens += grid.size
    return bits / tokens


def _report(stage: EntropyStage, coder: TokenCoder, schedules: tuple[str, ...]) -> dict[str, Any]:
    """Return held-out bits per token of the float form, the rounded form and coded intervals."""
    counts = stage.data.counts()
    share = counts[counts > 0] / counts.sum()
    result: dict[str, Any] = {
        "held_out_maps": len(stage.data.held_out),
        "held_out_tokens": int(sum(grid.size for grid in stage.data.held_out)),
        "uniform_bits": math.log2(stage.data.codebook_size),
        "order_0_bits": float(-(share * np.log2(share)).sum()),
    }
    for name in schedules:
        figures = {
            "float": stage.held_out_bits(name, quantized=False),
            "rounded": stage.held_out_bits(name, quantized=True),
            "integer": integer_bits(coder, stage.data.held_out, name),
        }
        above = figures["integer"] / figures["float"] - 1
        result[name] = {**figures, "integer_over_float_percent": 100 * above}
    return result


def trained_model(
    stage: RoundedStage,
    size_classes: tuple[set[int], set[int]],
    loop: LoopConfig,
    out: Path,
    minutes: float | None = None,
) -> IntTransformer | None:
    """Train a stage to its last step, then export its averaged weights.

    The same call resumes an interrupted run.

    ``size_classes`` are the size classes of the training grids' heights and widths. ``minutes`` is
    the time after which to stop, or None.

    Returns:
        The integer form, or None if steps remain or this is not the first process.
    """
    if train(stage, loop, out, stop_after_minutes=minutes) < loop.steps or stage.place.process:
        return None
    stage.place = ALONE
    stage.cpu()
    load_averaged(out, stage)
    stage.transformer.fill_unseen_sizes(*size_classes)
    return export(stage.transformer)


def train_entropy(
    config: EntropyConfig,
    loop: LoopConfig,
    data: Path,
    out: Path,
    *,
    minutes: float | None = None,
    schedules: tuple[str, ...] = (DEFAULT_SCHEDULE, "checkerboard", "quincunx", "var"),
) -> dict[str, Any] | None:
    """Train the entropy model on token maps, then export it to ``out/entropy``.

    Args:
        data: ``.npz`` of token maps, or a folder of such files.
        out: folder for checkpoint.pt, log.csv, held_out.csv, and finally entropy/ (config.json and
            model.safetensors) and report.json.
        minutes: time in minutes after which to stop. The same call then resumes the run. None sets
            no limit.
        schedules: schedules in the report.

    Returns:
        The report, or None if steps remain or this is not the first process.

    Raises:
        ValueError: token maps or settings are invalid.
        FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(loop.seed)
    stage = EntropyStage(config, TokenMaps(data))
    model = trained_model(stage, stage.data.size_classes(), loop, out, minutes)
    if model is None:
        return None
    model.save(out / "entropy")
    result = {
        "model": model.config.to_dict(),
        "fingerprint": model.fingerprint().hex(),
        "settings": {**asdict(config), "loop": asdict(loop)},
        **_report(stage, TokenCoder(model), schedules),
    }
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
