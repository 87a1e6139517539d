"""Small text conditioning of the embedded model: hashed words, no vocabulary file.

A caption is lower-cased and split into words; each word's CRC-32 picks a row of an embedding table.
The outputs are those of CLIP and T5 for SD3: a sequence and a pooled vector.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

__all__ = ["HashedTextEncoder"]

_WORD = re.compile(r"\w+")


class HashedTextEncoder(ModelMixin, ConfigMixin):
    """A network from captions to (sequence [B, length, dim], pooled [B, dim]).

    The table has ``buckets`` rows; row 0 is padding, and the empty caption is all padding. Words
    after the first ``length`` are ignored.
    """

    @register_to_config
    def __init__(self, buckets: int = 4096, dim: int = 64, length: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(buckets, dim)
        self.positions = nn.Parameter(torch.randn(length, dim) * 0.02)
        nn.init.normal_(self.words.weight, std=0.3)

    def rows(self, captions: Sequence[str]) -> Tensor:
        """Return table rows int64 [B, length] of the captions' words."""
        buckets, length = self.words.num_embeddings, self.positions.shape[0]
        rows = []
        for caption in captions:
            words = _WORD.findall(caption.lower())[:length]
            row = [1 + zlib.crc32(word.encode("utf-8")) % (buckets - 1) for word in words]
            rows.append(row + [0] * (length - len(words)))
        return torch.tensor(rows, dtype=torch.long).view(-1, length)

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return sequence [B, length, dim] and pooled [B, dim] embeddings of captions."""
        return self.embed(self.rows(captions).to(self.words.weight.device))

    def embed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of table rows int64 [B, length], on the table's device."""
        embedded = self.words(rows)
        present = (rows > 0)[..., None]
        pooled = (embedded * present).sum(1) / present.sum(1).clamp_min(1)
        return embedded + self.positions, pooled
