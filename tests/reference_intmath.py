"""Integer operations of the entropy model in Python integers, one number at a time.

Python's ``//`` and ``>>`` round down and its integers never overflow, so these are the definitions
of docs/entropy-model.md word for word.
"""

from __future__ import annotations


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def requantize(acc: int, multiplier: int, shift: int, low: int, high: int) -> int:
    return clamp((acc * multiplier + 2 ** (shift - 1)) >> shift, low, high)


def integer_sqrt(value: int) -> int:
    """The largest r with r * r <= value, bit by bit."""
    root = 0
    for bit in range(value.bit_length() // 2, -1, -1):
        if (root + (1 << bit)) ** 2 <= value:
            root += 1 << bit
    return root


def layer_norm(residual: list[int], gain: list[int]) -> list[int]:
    d = len(residual)
    mean = (sum(residual) + d // 2) // d
    y = [r - mean for r in residual]
    root = integer_sqrt(sum(v * v for v in y) * 256 // d) + 1
    pairs = zip(y, gain, strict=True)
    return [clamp((v * a + root // 2) // root, -127, 127) for v, a in pairs]


def softmax_weight(distance: int) -> int:
    """round(126.61 * 2^(-distance / 16)) from integers, 0 from 128 on."""
    weight = 0
    # weight + 1/2 <= 126.61 * 2^(-d/16)  <=>  (200 weight + 100)^16 * 2^d <= 25322^16
    while (200 * weight + 100) ** 16 * 2**distance <= 25322**16:
        weight += 1
    return weight


def attention_mean(weighted: int, total: int, gain_bits: int) -> int:
    """The weighted mean times 2^gain_bits, halves rounded up (total // 2 for odd totals)."""
    return clamp((weighted * 2**gain_bits + total // 2) // total, -127, 127)
