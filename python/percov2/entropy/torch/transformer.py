"""The token transformer in float32, for training, optionally rounded like the integer form.

One pass holds the contents and the queries of all stages, as percov2.entropy.staging does with
integers. ``TokenTransformer.quantized`` rounds weights, activations, attention weights and gains
with straight-through gradients. ``observing`` lets the static scales follow the activations.
``export`` turns the result into integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from percov2.entropy import ranges
from percov2.entropy.torch.quantization import (
    LOGIT_SCALE,
    RESIDUAL_SCALE,
    SCORE_SCALE,
    ActivationRange,
    QuantizedLinear,
    integer_gain,
    mean_gain_bits,
    round_to_int8,
    score_scales,
)
from percov2.entropy.torch.window_attention import window_attention
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.visibility import (
    HIDDEN_INDEX,
    NEVER,
    RADIUS,
    SIXTEENTHS,
    SIZE_CLASSES,
    START_ENTRIES,
    START_INDEX,
    WINDOW,
    Entries,
    content_entries,
    join,
    relative_index,
    sixteenth,
    size_class,
    start_entries,
)

__all__ = [
    "Crop",
    "TokenBatch",
    "TokenTransformer",
    "TransformerConfig",
    "TransformerLayer",
    "crop_batch",
]

_EMBEDDING_LIMIT = 7.9
"""Embeddings are int16 in steps of 2^-12."""


@dataclass(frozen=True)
class TokenBatch:
    """Crops of token grids and their places in the grids.

    Attributes:
        tokens: int64 [B, h, w].
        stages: int32 [B, h, w].
        rows: int64 [B, h], in sixteenths of the whole grid.
        columns: int64 [B, w], in sixteenths of the whole grid.
        sizes: int64 [B, 2], size classes of the whole grid's sides.
    """

    tokens: Tensor
    stages: Tensor
    rows: Tensor
    columns: Tensor
    sizes: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on a device."""
        parts = (self.tokens, self.stages, self.rows, self.columns, self.sizes)
        return TokenBatch(*(part.to(device) for part in parts))


@dataclass(frozen=True)
class Crop:
    """A crop, given by the tokens and stages [H, W] of the whole grid and its top left corner."""

    tokens: NDArray[np.integer]
    stages: NDArray[np.int32]
    top: int = 0
    left: int = 0


def crop_batch(crops: list[Crop], height: int, width: int) -> TokenBatch:
    """Join crops of ``height`` x ``width`` tokens into a batch."""
    tokens, stages, rows, columns, sizes = [], [], [], [], []
    for crop in crops:
        whole = crop.tokens.shape
        down = slice(crop.top, crop.top + height)
        right = slice(crop.left, crop.left + width)
        tokens.append(crop.tokens[down, right].astype(np.int64))
        stages.append(crop.stages[down, right].astype(np.int32))
        rows.append(sixteenth(np.arange(whole[0])[down], whole[0]))
        columns.append(sixteenth(np.arange(whole[1])[right], whole[1]))
        sizes.append((size_class(whole[0]), size_class(whole[1])))
    return TokenBatch(
        torch.from_numpy(np.stack(tokens)),
        torch.from_numpy(np.stack(stages)),
        torch.from_numpy(np.stack(rows)),
        torch.from_numpy(np.stack(columns)),
        torch.tensor(sizes),
    )


class _Norm(nn.Module):
    """LayerNorm with a gain and without a bias, whose output is an int8 activation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.range = ActivationRange()

    @property
    def scale(self) -> float:
        return float(self.range.scale)

    def integer_gain(self) -> Tensor:
        return integer_gain(self.gain, self.scale)

    def forward(self, x: Tensor, quantized: bool, observing: bool) -> Tensor:
        gain: Tensor = self.gain
        if quantized:
            steps = self.integer_gain().to(gain.dtype) * (self.scale / ranges.GAIN_STEPS)
            gain = gain + (steps - gain).detach()
        y = functional.layer_norm(x, x.shape[-1:], gain, eps=1e-6)
        if observing:
            self.range.observe(y.detach().abs().amax().view(1))
        return round_to_int8(y, self.range.scale) if quantized else y


class TransformerLayer(nn.Module):
    """Attention over contents and a feed-forward part. ``layers.Layer`` is the integer form."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, inner = config.dim, config.inner
        self.config = config
        self.attention_norm = _Norm(dim)
        self.q = QuantizedLinear(dim, inner)
        self.kv = QuantizedLinear(dim, 2 * inner)
        self.bias = _initial_bias(config.heads)
        self.out = QuantizedLinear(inner, dim)
        self.mlp_norm = _Norm(dim)
        self.up = QuantizedLinear(dim, config.hidden)
        self.down = QuantizedLinear(config.hidden, dim)
        self.q_range = ActivationRange(config.heads)
        self.k_range = ActivationRange(config.heads)
        self.v_range = ActivationRange()
        self.mean_range = ActivationRange()
        self.up_range = ActivationRange()
        self.gelu_range = ActivationRange()
        for linear in (self.q, self.kv, self.up, self.out, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        for linear in (self.out, self.down):
            linear.weight.data.div_(math.sqrt(2 * config.layers))

    def score_scales(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scales of q and of k for each head, and the shift of their product."""
        return score_scales(self.q_range.amax, self.k_range.amax, self.config.head_dim)

    def gain_bits(self) -> int:
        """Return the number of bits by which the integer form scales up the mean of values."""
        return mean_gain_bits(float(self.v_range.amax), float(self.mean_range.amax))

    def mean_scale(self) -> float:
        """Return the quantization step of the attention output."""
        return float(self.v_range.scale) / 2 ** self.gain_bits()

    def kv_scale(self) -> Tensor:
        """Return the scales of the outputs of ``kv``: float [2 * inner]."""
        head_dim = self.config.head_dim
        k = self.score_scales()[1].repeat_interleave(head_dim)
        return torch.cat([k, self.v_range.scale.expand(self.config.inner)])

    def _split(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, E, parts * inner] as float32 [parts, B, heads, E, head_dim]."""
        shape = (*x.shape[:2], -1, self.config.heads, self.config.head_dim)
        return x.to(torch.float32).view(shape).permute(2, 0, 3, 1, 4).contiguous()

    def keys_values(self, contents: Tensor, quantized: bool, observing: bool) -> Tensor:
        """Return keys and values [2, B, heads, K, head_dim] of contents [B, K, dim]."""
        x = self.attention_norm(contents, quantized, observing)
        if quantized:
            scale = self.kv_scale()
            x = round_to_int8(self.kv.rounded(x, self.attention_norm.scale, scale), scale)
        else:
            x = self.kv(x)
        pair = self._split(x)
        if observing:
            self.k_range.observe(pair[0].detach().abs().amax((0, 2, 3)))
            self.v_range.observe(pair[1].detach().abs().amax().view(1))
        return pair

    def forward(
        self,
        x: Tensor,
        pair: Tensor,
        index: Tensor,
        mask: Tensor,
        quantized: bool,
        observing: bool,
    ) -> Tensor:
        """Return the residual of the readers after this layer, [B, E, dim].

        Args:
            x: [B, E, dim], the residual of the readers.
            pair: [2, B, heads, K, head_dim], keys and values.
            index: int64 [E, K], indices into the table of relative positions.
            mask: float32 [B, E, K], added to the scores.
            quantized, observing: the attributes of ``TokenTransformer``.
        """
        y = self.attention_norm(x, quantized, observing)
        bias: Tensor = self.bias
        if quantized:
            scale = self.score_scales()[0].repeat_interleave(self.config.head_dim)
            q = self._split(
                round_to_int8(self.q.rounded(y, self.attention_norm.scale, scale), scale)
            )
            limit = ranges.MAX_SCORE_BIAS
            steps = (bias / SCORE_SCALE).round().clamp(-limit, limit)
            bias = bias / SCORE_SCALE + (steps - bias / SCORE_SCALE).detach()
        else:
            q = self._split(self.q(y))
        if observing:
            self.q_range.observe(q.detach().abs().amax((0, 1, 3, 4)))
        factor = self.config.head_dim**-0.5 / (SCORE_SCALE if quantized else 1.0)
        table = bias.index_select(1, index.flatten()).view(-1, *index.shape)
        mean = window_attention(q[0] * factor, pair[0], pair[1], table, mask, quantized)
        if observing:
            self.mean_range.observe(mean.detach().abs().amax().view(1))
        mean = mean.transpose(1, 2).reshape(*x.shape[:2], self.config.inner)
        residual = x.new_tensor([RESIDUAL_SCALE])
        if not quantized:
            x = x + self.out(mean)
            u = self.up(self.mlp_norm(x, quantized, observing))
            a = functional.gelu(u)
        else:
            step = self.mean_scale()
            mean = round_to_int8(mean, mean.new_tensor([step]))
            x = x + self.out.rounded(mean, step, residual)
            y = self.mlp_norm(x, quantized, observing)
            u = self.up.rounded(y, self.mlp_norm.scale, self.up_range.scale)
            a = round_to_int8(
                functional.gelu(round_to_int8(u, self.up_range.scale)), self.gelu_range.scale
            )
        if observing:
            self.up_range.observe(u.detach().abs().amax().view(1))
            self.gelu_range.observe(a.detach().abs().amax().view(1))
        if not quantized:
            return x + self.down(a)
        return x + self.down.rounded(a, float(self.gelu_range.scale), residual)


def _initial_bias(heads: int) -> nn.Parameter:
    """Return a bias [heads, HIDDEN_INDEX] that falls with distance, faster for earlier heads."""
    offset = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float32)
    distance = torch.hypot(offset[:, None], offset[None]).view(1, WINDOW * WINDOW)
    slope = 2.0 ** -torch.arange(heads, dtype=torch.float32)[:, None]
    bias = torch.zeros(heads, HIDDEN_INDEX)
    bias[:, :START_INDEX] = -slope * distance
    return nn.Parameter(bias.clamp_(min=-8.0))


class TokenTransformer(nn.Module):
    """A model of every token of a crop given all earlier stages.

    Attributes:
        quantized: True to round as the integer program does.
        observing: True to update the static scales from the activations.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.quantized = False
        self.observing = False
        dim = config.dim
        self.token = nn.Parameter(torch.randn(config.codebook_size, dim) * 0.5)
        self.query = nn.Parameter(torch.randn(dim) * 0.5)
        self.start = nn.Parameter(torch.randn(START_ENTRIES, dim) * 0.5)
        self.row = nn.Parameter(torch.randn(SIXTEENTHS, dim) * 0.05)
        self.column = nn.Parameter(torch.randn(SIXTEENTHS, dim) * 0.05)
        # Classes that no training grid has stay zero.
        self.height = nn.Parameter(torch.zeros(SIZE_CLASSES, dim))
        self.width = nn.Parameter(torch.zeros(SIZE_CLASSES, dim))
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.layers))
        self.head_norm = _Norm(dim)
        self.head = QuantizedLinear(dim, config.codebook_size)
        nn.init.normal_(self.head.weight, std=0.1 * dim**-0.5)
        nn.init.zeros_(self.head.bias)

    def set_frequencies(self, counts: Tensor) -> None:
        """Set the head's biases from the counts [V] of the tokens in the training data."""
        smoothed = counts.to(torch.float32) + 0.5
        self.head.bias.data.copy_(torch.log(smoothed / smoothed.mean()))

    def stack(self) -> list[TransformerLayer]:
        """Return the layers in order."""
        return cast("list[TransformerLayer]", list(self.layers))

    def fill_unseen_sizes(self, heights: set[int], widths: set[int]) -> None:
        """Copy the nearest trained embedding to size classes outside ``heights`` and ``widths``."""
        with torch.no_grad():
            for table, seen in ((self.height, heights), (self.width, widths)):
                for unseen in set(range(SIZE_CLASSES)) - seen:
                    table[unseen] = table[min(seen, key=lambda c: abs(c - unseen))]

    def embeddings(self) -> dict[str, Tensor]:
        """Return all embedding tables, within the range of the integer form."""
        names = ("token", "query", "start", "row", "column", "height", "width")
        limit = _EMBEDDING_LIMIT
        return {name: getattr(self, name).clamp(-limit, limit) for name in names}

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return logits in nats, float32 [B, h * w, V] in raster order."""
        count, height, width = batch.tokens.shape
        table = self.embeddings()
        place = table["row"][batch.rows][:, :, None] + table["column"][batch.columns][:, None]
        place = place.view(count, height * width, -1)
        start = self.start_payload(table, batch.sizes)
        contents = torch.cat([start, table["token"][batch.tokens.view(count, -1)] + place], 1)
        x = table["query"] + place

        index, outside = (part.to(x.device) for part in _geometry(height, width))
        stage = functional.pad(batch.stages.view(count, -1), (START_ENTRIES, 0))
        mask = _mask(stage, stage, outside)
        query_mask = _mask(stage[:, START_ENTRIES:] - 1, stage, outside[START_ENTRIES:])
        query_index = index[START_ENTRIES:]
        modes = (self.quantized, self.observing)
        for layer in self.stack():
            pair = layer.keys_values(contents, *modes)
            x = layer(x, pair, query_index, query_mask, *modes)
            if layer is not self.layers[-1]:
                contents = layer(contents, pair, index, mask, *modes)
        return self.read_out(x)

    def start_payload(self, table: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """Return the start entries of grids, [B, START_ENTRIES, dim].

        ``table`` comes from ``embeddings``. ``sizes`` are the size classes, int64 [B, 2].
        """
        sides = [table["height"][sizes[:, 0]], table["width"][sizes[:, 1]]]
        return table["start"] + functional.pad(torch.stack(sides, 1), (0, 0, 1, 0))

    def read_out(self, x: Tensor) -> Tensor:
        """Return the logits in nats, float32 [B, E, V], of a residual [B, E, dim]."""
        y = self.head_norm(x, self.quantized, self.observing)
        if self.quantized:
            return self.head.rounded(y, self.head_norm.scale, x.new_tensor([LOGIT_SCALE]))
        return self.head(y).to(torch.float32)


def _mask(reads: Tensor, key_stage: Tensor, outside: Tensor) -> Tensor:
    """Return HIDDEN_SCORE for keys [B, K] hidden from readers [B, E], else 0: float32 [B, E, K]."""
    hidden = (key_stage[:, None] > reads[:, :, None]) | outside
    return hidden.to(torch.float32).mul_(ranges.HIDDEN_SCORE)


@lru_cache(maxsize=32)
def _geometry(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the relative positions of all contents and start entries of a crop.

    The positions are int64 [K, K], with 0 for keys outside the window. The second result, bool
    [K, K], is True for these keys.
    """
    position = np.arange(height * width, dtype=np.int64)
    keys = join(start_entries(), content_entries(np.ones(len(position), np.int32), position, width))
    everything = np.full(len(keys), NEVER, np.int32)
    readers = Entries(keys.row, keys.column, keys.key_stage, everything)
    index = torch.from_numpy(relative_index(readers, keys).astype(np.int64))
    outside = index == HIDDEN_INDEX
    return index.masked_fill(outside, 0), outside
