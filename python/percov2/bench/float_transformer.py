"""The entropy model's float32 counterpart in eager torch, as one would write it: the one to beat.

The same entries, widths and mask as the integer model: contents and queries of all stages in one
pass, LayerNorm, q, k, v and output projections, scaled dot product attention under a boolean mask,
GELU, and the map to logits. It has random weights and, unlike the integer model, no relative
positions, which would cost it more.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from percov2.entropy import entries, schedule
from percov2.entropy.entries import START_ENTRIES, Entries
from percov2.entropy.transformer_config import TransformerConfig


def pass_entries(stages: NDArray[np.int32]) -> tuple[NDArray[np.int64], Entries, Entries]:
    """Return the coding order of the pass that encodes a grid, its readers and its keys.

    The keys are start entries and contents, but for the last stage's, which nobody reads; the
    readers are the keys and then the queries of all tokens.
    """
    coding = schedule.order(stages)
    stage, width = stages.reshape(-1)[coding], stages.shape[1]
    known = int(np.searchsorted(stage, stage[-1]))
    contents = entries.content_entries(stage[:known], coding[:known], width)
    keys = entries.join(entries.start_entries(), contents)
    return coding, entries.join(keys, entries.query_entries(stage, coding, width)), keys


class FloatLayer(nn.Module):
    """Attention to contents, then feed-forward, each added to the residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.dim)
        self.q = nn.Linear(config.dim, config.inner)
        self.kv = nn.Linear(config.dim, 2 * config.inner)
        self.out = nn.Linear(config.inner, config.dim)
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.hidden)
        self.down = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor, keys: int, first_reader: int, mask: Tensor) -> Tensor:
        """x [B, E, dim], the first ``keys`` of which are contents -> rows from ``first_reader``.

        mask bool [E - first_reader, keys]: what is seen.
        """
        y = self.attention_norm(x)
        x = x[:, first_reader:]
        q = self._split(self.q(y[:, first_reader:]))
        k, v = (self._split(part) for part in self.kv(y[:, :keys]).chunk(2, -1))
        mean = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mean.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FloatTransformer(nn.Module):
    """One pass over grids of one schedule.

    Args:
        config: sizes of the integer model.
        stages: int32 [h, w], values 1 .. S.
    """

    def __init__(self, config: TransformerConfig, stages: NDArray[np.int32]) -> None:
        super().__init__()
        coding, readers, keys = pass_entries(stages)
        self.known = len(keys) - START_ENTRIES
        self.mask = torch.from_numpy(entries.visible(readers, keys))
        self.coding = torch.from_numpy(coding)
        self.token = nn.Embedding(config.codebook_size, config.dim)
        self.query = nn.Parameter(torch.randn(config.dim))
        self.start = nn.Parameter(torch.randn(START_ENTRIES, config.dim))
        self.place = nn.Parameter(torch.randn(len(coding), config.dim))
        self.layers = nn.ModuleList(FloatLayer(config) for _ in range(config.layers))
        self.head_norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.codebook_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, h, w] -> logits float32 [B, h * w, V] in coding order."""
        batch = len(tokens)
        ordered = tokens.flatten(1)[:, self.coding[: self.known]]
        x = torch.cat(
            [
                self.start.expand(batch, -1, -1),
                self.token(ordered) + self.place[: self.known],
                (self.query + self.place).expand(batch, -1, -1),
            ],
            1,
        )
        keys = START_ENTRIES + self.known
        for layer in self.layers:
            last = layer is self.layers[-1]  # only queries are needed after it
            x = layer(x, keys, keys if last else 0, self.mask[keys if last else 0 :])
        return self.head(self.head_norm(x))
