"""Synthetic data: logits, symbols drawn from their softmax, and their ideal cost.

Logits are independent normal numbers with a standard deviation of ``SPREAD`` nats. With a codebook
of 256, a symbol then costs about 5.4 bits, like a token of a trained model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.cdf import default_prob_bits

__all__ = ["Case", "Shape", "ideal_bytes", "integer_logits", "interval_bytes", "make_case"]

SPREAD = 1.9
UNITS_PER_NAT = np.float32(256 / np.log(2.0))
"""Integer logits are base-2 logarithms in units of 1/256."""


@dataclass(frozen=True)
class Shape:
    """The size of a case: codebook entries V, tokens per image, and images.

    Each image has its own stream.
    """

    codebook: int
    tokens: int
    images: int

    def __str__(self) -> str:
        return f"V={self.codebook}, {self.images}x{self.tokens}"

    @property
    def symbols(self) -> int:
        """Return the number of symbols in all images."""
        return self.tokens * self.images


@dataclass(frozen=True)
class Case:
    """A case of B images with n tokens each.

    Attributes:
        shape: its size.
        logits: float32 [B, n, V], in nats.
        symbols: int32 [B, n].
        checks: uint16 [B].
    """

    shape: Shape
    logits: NDArray[np.float32]
    symbols: NDArray[np.int32]
    checks: NDArray[np.uint16]

    @property
    def prob_bits(self) -> int:
        """Return the precision that percov2 uses for this codebook."""
        return default_prob_bits(self.shape.codebook)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Return the number of symbols in each stream, int64 [B]."""
        return np.full(self.shape.images, self.shape.tokens, dtype=np.int64)

    def first(self, images: int) -> Case:
        """Return the case with only its first ``images`` images."""
        shape = replace(self.shape, images=min(images, self.shape.images))
        part = slice(shape.images)
        return Case(shape, self.logits[part], self.symbols[part], self.checks[part])


def make_case(shape: Shape, seed: int = 0) -> Case:
    """Return the case that a shape and a seed determine."""
    rng = np.random.default_rng([seed, shape.codebook, shape.tokens, shape.images])
    logits = np.empty((shape.images, shape.tokens, shape.codebook), dtype=np.float32)
    symbols = np.empty((shape.images, shape.tokens), dtype=np.int32)
    for image, chosen in zip(logits, symbols, strict=True):
        rng.standard_normal(out=image, dtype=np.float32)
        image *= np.float32(SPREAD)
        bounds = np.exp(image, dtype=np.float64).cumsum(1)
        target = rng.random((len(bounds), 1)) * bounds[:, -1:]
        chosen[:] = np.minimum((bounds <= target).sum(1), shape.codebook - 1)
    return Case(shape, logits, symbols, rng.integers(0, 2**16, shape.images, dtype=np.uint16))


def integer_logits(logits: NDArray[np.float32]) -> NDArray[np.int16]:
    """Convert logits from nats to base 2 with 8 fractional bits, with each row's maximum at 0."""
    integers = np.empty(logits.shape, dtype=np.int16)
    for image, result in zip(logits, integers, strict=True):
        difference = image - image.max(-1, keepdims=True)
        result[:] = np.rint(np.maximum(difference * UNITS_PER_NAT, np.float32(-32768)))
    return integers


def ideal_bytes(logits: NDArray[np.float32], symbols: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return each image's ideal cost in bytes, [B], under the softmax of the logits."""
    costs = np.empty(len(logits))
    for i, (image, chosen) in enumerate(zip(logits, symbols, strict=True)):
        exact = image.astype(np.float64)
        exact -= exact.max(1, keepdims=True)
        nats = np.log(np.exp(exact).sum(1)) - exact[np.arange(len(chosen)), chosen]
        costs[i] = nats.sum() / np.log(2.0) / 8
    return costs


def interval_bytes(freqs: NDArray[np.int32], prob_bits: int) -> NDArray[np.float64]:
    """Return the ideal cost of each image's intervals in bytes, [B].

    ``freqs`` are the widths of the intervals, int32 [B, n].
    """
    return (prob_bits - np.log2(freqs)).sum(1) / 8
