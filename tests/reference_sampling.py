"""Oracle of drawn tokens: docs/entropy-model.md, section 6, on Python integers."""

from __future__ import annotations

from collections.abc import Sequence

from percov2.entropy.cdf import WEIGHT_TABLE


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox-4x32-10, as in the paper's Figure: ten rounds of two 32 × 32 -> 64 products."""
    k0, k1 = key
    c = list(counter)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            p1 // 2**32 ^ c[1] ^ k0,
            p1 % 2**32,
            p0 // 2**32 ^ c[3] ^ k1,
            p0 % 2**32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return tuple(c)


def draw(logits: Sequence[int], place: int, seed: int, sharpness: int) -> int:
    """The token of one place."""
    weights = []
    largest = max(logits)
    for logit in logits:
        below = (largest - logit) * sharpness // 256
        octaves, part = divmod(below, 256)
        weights.append(WEIGHT_TABLE[part] // 2**octaves)
    least = max(weights) // 1024
    weights = [w if w >= least else 0 for w in weights]
    x = philox((seed, 0), (place, 0, 0, 0))
    target = (2**32 * x[0] + x[1]) * sum(weights) // 2**64
    token = 0
    while target >= weights[token]:
        target -= weights[token]
        token += 1
    return token
