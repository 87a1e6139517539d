"""Entropy models by the name of their executor, and equality of arrays and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from percov2.entropy import int_transformer, token_coder
from percov2.entropy.int_transformer import random_tensors
from percov2.entropy.rans import as_array
from percov2.entropy.torch import int_transformer as placed
from percov2.entropy.torch import token_coder as placed_coder
from percov2.entropy.transformer_config import TransformerConfig


def model_on(
    executor: str, config: TransformerConfig, tensors: dict[str, Any], device: Any = "cpu"
) -> int_transformer.IntTransformer:
    """Return a model that "cpu" runs, or "torch" or "triton" on a device."""
    if executor == "cpu":
        return int_transformer.IntTransformer(config, tensors)
    return placed.IntTransformer(config, tensors, device, executor)


def random_on(executor: str, config: TransformerConfig, seed: int, device: Any = "cpu") -> Any:
    """Return the random model of a seed; see ``model_on``."""
    return model_on(executor, config, random_tensors(config, seed), device)


def load_on(executor: str, folder: Path) -> int_transformer.IntTransformer:
    """Return the model in a folder; see ``model_on``."""
    model = int_transformer.IntTransformer.load(folder)
    return model_on(executor, model.config, model.tensors)


def coder_of(model: int_transformer.IntTransformer) -> token_coder.TokenCoder:
    """Return the coder of a model."""
    if isinstance(model, placed.IntTransformer):
        return placed_coder.TokenCoder(model)
    return token_coder.TokenCoder(model)


def same(*values: Any) -> bool:
    """Return whether arrays or tensors have equal dtypes, shapes and elements."""
    first, *others = [as_array(value) for value in values]
    return all(first.dtype == other.dtype and np.array_equal(first, other) for other in others)
