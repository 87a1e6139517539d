"""Entropy models by the name of their executor, and equality of arrays and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from percov2.entropy import int_transformer, schedule, token_coder
from percov2.entropy.int_transformer import random_tensors
from percov2.entropy.rans import as_array
from percov2.entropy.staging import StagedDecoder
from percov2.entropy.torch import int_transformer as placed
from percov2.entropy.torch import token_coder as placed_coder
from percov2.entropy.transformer_config import TransformerConfig

FROZEN = Path(__file__).parents[1] / "data" / "entropy_v1"
"""A model whose integers, and whose files, never change."""


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


def staged_logits(model: Any, tokens: Any, stages: np.ndarray) -> np.ndarray:
    """Return the logits of tokens in coding order, each stage after those before it."""
    decoder = StagedDecoder(model, stages, len(tokens))
    ordered = as_array(tokens).reshape(len(tokens), -1)[:, schedule.order(stages)]
    parts: list[np.ndarray] = []
    known = 0
    while decoder.remaining:
        parts.append(as_array(decoder.logits()))
        count = parts[-1].shape[1]
        decoder.accept(ordered[:, known : known + count])
        known += count
    assert same(decoder.tokens(), tokens)
    return np.concatenate(parts, 1)


def equal(a: Any, b: Any) -> bool:
    """Return whether nested dictionaries and lists are equal, arrays and tensors by ``same``."""
    if hasattr(a, "dtype"):
        return hasattr(b, "dtype") and same(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
