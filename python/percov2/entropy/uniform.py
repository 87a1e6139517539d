"""The uniform entropy model: every token costs log2 V bits.

It serves codebooks that have no trained model, and trained models are compared with it (the paper's
"uniform coding"). It is an ordinary integer model with constant tensors.
"""

from __future__ import annotations

import numpy as np

from percov2.entropy.int_transformer import IntTransformer, tensor_layout
from percov2.entropy.transformer_config import TransformerConfig

__all__ = ["uniform_model"]


def uniform_model(codebook_size: int) -> IntTransformer:
    """Return the smallest integer transformer whose logits are all equal.

    If V is a power of two, every interval has 2^prob_bits / V slots; otherwise intervals differ by
    one slot.

    Raises:
        ValueError: the codebook does not have 2 to 8192 entries.

    >>> np.unique(uniform_model(256).logits(np.zeros((1, 1, 1), np.int32)))
    array([0], dtype=int16)
    """
    config = TransformerConfig(codebook_size, dim=1, heads=1, head_dim=1, layers=1, hidden=1)
    least = {"multiplier": 1, "shift": 5}  # the smallest values that every tensor's range allows
    return IntTransformer(
        config,
        {
            name: np.full(shape, least.get(name.rpartition(".")[2], 0), dtype=dtype)
            for name, (dtype, shape) in tensor_layout(config).items()
        },
    )
