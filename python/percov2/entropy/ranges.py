"""Ranges and tables of the integer program, as docs/reference/entropy-model.md defines them.

``whole_number`` checks the whole numbers that callers of the entropy engine give.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

__all__ = [
    "ACC_LIMIT",
    "GAIN_STEPS",
    "HIDDEN_SCORE",
    "INT8_LIMIT",
    "LOGIT_MAX",
    "LOGIT_MIN",
    "LOGIT_STEPS",
    "MAX_DIM",
    "MAX_GAIN",
    "MAX_GAIN_BITS",
    "MAX_MULTIPLIER",
    "MAX_SCORE_BIAS",
    "MAX_SHIFT",
    "MAX_TERMS",
    "RESIDUAL_LIMIT",
    "SCORE_SHIFT_MAX",
    "SCORE_SHIFT_MIN",
    "SCORE_STEPS",
    "WEIGHT_AMPLITUDE",
    "WEIGHT_TABLE",
    "whole_number",
]


INT8_LIMIT = 127
"""Activations and weights are in [-127, 127]; -128 is never used."""
MAX_TERMS = 1040
"""Largest K with K * 127**2 < 2**24."""
ACC_LIMIT = 2**24
"""Accumulators (products plus bias) are strictly below this in magnitude."""
MAX_MULTIPLIER = 127
MAX_SHIFT = 24
RESIDUAL_LIMIT = 2**20
"""The residual stream is saturated to [-2^20, 2^20]."""
LOGIT_MIN, LOGIT_MAX = -(2**15), 2**15 - 1
LOGIT_STEPS = 256
"""Logits count 1/256 of an octave."""
MAX_GAIN = 2047
"""Largest magnitude of a LayerNorm gain."""
GAIN_STEPS = 16
"""``layer_norm`` divides by 16 sigma, so gains count sixteenths."""
MAX_DIM = 1024
"""Largest width of the residual stream (ranges of ``layer_norm``)."""
SCORE_STEPS = 16
"""Attention scores count sixteenths of an octave."""
SCORE_SHIFT_MIN, SCORE_SHIFT_MAX = 5, 12
MAX_SCORE_BIAS = 2047
"""Largest magnitude of an entry of the relative-position table."""
HIDDEN_SCORE = -(2**20)
"""This is added to the score of a key that a query must not see, so that its weight is 0."""
MAX_GAIN_BITS = 5
WEIGHT_AMPLITUDE = 126.61
WEIGHT_TABLE: tuple[int, ...] = (
    # floor(126.61 * 2**(-d / 16) + 1/2), d = 0 ... 127
    *(127, 121, 116, 111, 106, 102, 98, 93, 90, 86, 82, 79, 75, 72, 69, 66),
    *(63, 61, 58, 56, 53, 51, 49, 47, 45, 43, 41, 39, 38, 36, 35, 33),
    *(32, 30, 29, 28, 27, 25, 24, 23, 22, 21, 21, 20, 19, 18, 17, 17),
    *(16, 15, 15, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 9, 8),
    *(8, 8, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 5, 4, 4),
    *(4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2),
    *(2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    *(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
)
"""Softmax weight of a score d sixteenths of an octave below the maximum; it is 0 for d >= 128."""


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer of Python or numpy in low .. high as a plain int.

    Raises ValueError, with the name, the range and the value, for anything else, also for a bool.
    """
    if type(value) is int and low <= value <= high:  # at once, because calls per symbol check this
        return value
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    shown = int(value) if isinstance(value, np.integer) else repr(value)
    raise ValueError(f"{name} is {shown}; it must be a whole number from {low} to {high}")
