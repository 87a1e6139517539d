"""Small text conditioning of the embedded model: hashed words, no vocabulary file.

The words of a caption pick rows of a table (``percov2.models.tiny.captions``). Outputs are as those
of CLIP and T5 for SD3: a sequence and a pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from percov2.models.tiny.captions import caption_rows

__all__ = ["HashedTextEncoder"]


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
        rows = caption_rows(captions, self.words.num_embeddings, self.positions.shape[0])
        return torch.from_numpy(rows)

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return sequence [B, length, dim] and pooled [B, dim] embeddings of captions."""
        return self.embed(self.rows(captions).to(self.words.weight.device))

    def embed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of table rows int64 [B, length], on the table's device."""
        embedded = self.words(rows)
        present = (rows > 0)[..., None]
        pooled = (embedded * present).sum(1) / present.sum(1).clamp_min(1)
        return embedded + self.positions, pooled
