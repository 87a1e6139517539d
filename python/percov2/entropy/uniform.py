"""The uniform entropy model: every token costs log2 V bits, whatever came before.

It stands in while no model is trained for a codebook, and is the bound that trained ones are
compared with (the paper's "uniform coding"). Its integers are an ordinary integer program.
"""

from __future__ import annotations

import numpy as np

from percov2.entropy.int_transformer import IntTransformer, tensor_layout
from percov2.entropy.transformer_config import TransformerConfig


def uniform_model(codebook_size: int) -> IntTransformer:
    """The smallest integer transformer, all of whose logits are equal.

    For a power of two every interval has exactly 2^prob_bits / V slots; otherwise they differ by
    one slot.

    Raises:
        ValueError: unless 2 <= codebook_size <= 8192.

    >>> np.unique(uniform_model(256).logits(np.zeros((1, 1, 1), np.int32)))
    array([0], dtype=int16)
    """
    config = TransformerConfig(codebook_size, dim=1, heads=1, head_dim=1, layers=1, hidden=1)
    least = {"multiplier": 1, "shift": 5}  # the least that the ranges of every place allow
    return IntTransformer(
        config,
        {
            name: np.full(shape, least.get(name.rpartition(".")[2], 0), dtype=dtype)
            for name, (dtype, shape) in tensor_layout(config).items()
        },
    )
