"""Integer operations of the entropy model, as exact torch programs.

Every function states the range of its inputs and outputs. Inside these ranges the result does not
depend on the device, the number of threads, the batch or the order of summation.
docs/reference/entropy-model.md is the normative text.

Factors of matrix products are integers in float32 tensors. A float32 product of integer matrices is
exact while every partial sum stays below 2^24. For K <= 1040 terms this is so, because
``K * 127**2 < 2**24``. The backend must really multiply float32 (no TF32, no bfloat16 passes):
``exact_float32`` checks torch's settings, and ``self_test`` tests the products on a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from percov2.entropy.ranges import (
    INT8_LIMIT,
    MAX_TERMS,
    RESIDUAL_LIMIT,
    SCORE_STEPS,
    WEIGHT_AMPLITUDE,
    WEIGHT_TABLE,
)

__all__ = [
    "attention_mean",
    "exact_float32",
    "integer_sqrt",
    "layer_norm",
    "linear",
    "lookup",
    "requantize",
    "require_exact_float32",
    "residual_add",
    "self_test",
    "softmax_weights_",
]


def require_exact_float32() -> None:
    """Raise RuntimeError if torch may round float32 factors before it multiplies them."""
    modes: dict[str, Callable[[], bool]] = {
        "torch.get_float32_matmul_precision()": (
            lambda: torch.get_float32_matmul_precision() != "highest"
        ),
        "torch.backends.cuda.matmul.allow_tf32": (
            lambda: bool(torch.backends.cuda.matmul.allow_tf32)
        ),
    }
    for name, fast in modes.items():
        try:
            allowed = fast()
        except RuntimeError:  # torch raises it for the newer fp32_precision settings
            allowed = True
        if allowed:
            raise RuntimeError(
                f"{name} allows reduced-precision products, which would change the coded tokens: "
                "call torch.set_float32_matmul_precision('highest') before coding"
            )


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Run an integer pass without gradients or autocast, and with exact float32 products.

    Raises RuntimeError if torch allows reduced precision.
    """
    require_exact_float32()
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


def self_test(device: torch.device | str = "cpu") -> None:
    """Prove on ``device`` that products at the limits and the softmax weights are exact.

    Raises RuntimeError if they are not.
    """
    device = torch.device(device)
    with exact_float32(device):
        for rows in (1, 7, 512):
            _test_products(rows, device)
        table = torch.tensor(WEIGHT_TABLE + (0,) * 128, dtype=torch.float32)
        for length in (1, 3, 17, 256, 1031):
            d = torch.arange(length, dtype=torch.float32) % 256
            weights = softmax_weights_(-d[None].to(device))[0].cpu()
            if not torch.equal(weights, table[d.to(torch.int64)]):
                raise RuntimeError(
                    f"softmax weights are not exact on {device}: the entropy model cannot run there"
                )


def _test_products(rows: int, device: torch.device) -> None:
    """Multiply matrices [rows, 1040] and [1040, 7] of ±127 in float32 and compare with int64."""
    hashed = torch.arange(rows * MAX_TERMS, dtype=torch.int64) * 2654435761 >> 13
    a = ((hashed & 1) * 254 - 127).view(rows, MAX_TERMS)
    b = ((hashed[:MAX_TERMS] >> 1 & 1) * 254 - 127).repeat(7, 1)
    b[0], b[1] = a[0], -a[-1]  # the extreme sums +K * 127^2 and -K * 127^2
    every = torch.arange(2, 7)[:, None]
    b[2:] = torch.where(torch.arange(MAX_TERMS) % every == 0, -b[2:], b[2:])
    bias = torch.tensor([5, -5, 1, 0, 0, -1, 2], dtype=torch.int64)
    expected = a @ b.T + bias
    got = linear(a.float().to(device), b.float().to(device), bias.float().to(device))
    if not torch.equal(got.cpu().to(torch.int64), expected):
        raise RuntimeError(
            f"float32 products of integers are not exact on {device} ({rows} rows): "
            "the entropy model would give other tokens than on other machines"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the exact product x @ weight.T + bias.

    Args:
        x: float32 integers [..., K] in [-127, 127], with K <= 1040.
        weight: float32 integers [n, K] in [-127, 127].
        bias: float32 integers [n]. The caller guarantees sum |weight| * 127 + |bias| < 2^24 for
            each output.

    Returns:
        float32 integers [..., n].
    """
    return torch.nn.functional.linear(x, weight, bias)


def requantize(acc: Tensor, multiplier: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
    """Return clamp((acc * multiplier + 2^(shift - 1)) >> shift, low, high), arithmetic shift.

    Args:
        acc: float32 or int32 integers [..., n], |acc| < 2^24.
        multiplier: int32 [n] in 1 ... 127.
        shift: int32 [n] in 1 ... 24. |acc * multiplier| + 2^(shift - 1) is below 2^31, so int32 is
            enough throughout.
        low, high: bounds of the result.

    Returns:
        int32 [..., n].
    """
    half = torch.ones_like(shift).bitwise_left_shift_(shift - 1)
    result = acc.to(torch.int32, copy=True)
    return result.mul_(multiplier).add_(half).bitwise_right_shift_(shift).clamp_(low, high)


def residual_add(residual: Tensor, update: Tensor) -> Tensor:
    """Add ``update`` to ``residual`` in place and saturate. Both are int32 in [-2^20, 2^20]."""
    return residual.add_(update).clamp_(-RESIDUAL_LIMIT, RESIDUAL_LIMIT)


def integer_sqrt(value: Tensor) -> Tensor:
    """Return floor(sqrt(value)) for int64 values in [0, 2^51]."""
    # The float64 root is off by less than one; the correction makes it exact.
    root = value.to(torch.float64).sqrt_().floor_().to(torch.int64)
    root -= (root * root > value).to(torch.int64)
    root += ((root + 1) * (root + 1) <= value).to(torch.int64)
    return root


def layer_norm(residual: Tensor, gain: Tensor) -> Tensor:
    """Return the integer LayerNorm of a residual.

    ``residual`` is int32 [..., d] in [-2^20, 2^20] with d <= 1024, and ``gain`` is int32 [d] in
    [-2047, 2047]. With
        c = floor((sum(r) + d / 2) / d), y = r - c, v = sum(y^2) < 2^51,
        R = isqrt(floor(v * 2^8 / d)) + 1 > 16 sigma
    the result is clamp(floor((y * gain + R * 2^12 + floor(R / 2)) / R) - 2^12, -127, 127).
    |y * gain / R| < sqrt(d) * 2047 / 16 < 2^12, so the numerator is never negative.
    Returns float32 integers [..., d].
    """
    dim = residual.shape[-1]
    # Shifted by 2^20 per term, so that the division never sees a negative numerator.
    total = residual.sum(-1, keepdim=True, dtype=torch.int64) + (RESIDUAL_LIMIT * dim + dim // 2)
    mean = torch.div(total, dim, rounding_mode="floor").sub_(RESIDUAL_LIMIT).to(torch.int32)
    # sum(y^2) <= sum(r^2) + d < 2^51 and |y| <= 2^21: exact in float64 in any order.
    y = (residual - mean).to(torch.float64)
    energy = y.square().sum(-1, keepdim=True).to(torch.int64)
    root = integer_sqrt(torch.div(energy * 256, dim, rounding_mode="floor")) + 1
    r = root.to(torch.float64)
    # The numerator is an integer below 2^38 and R < 2^25: a quotient below an integer is below it
    # by at least 2^-25, far more than float64 rounds, so the floor is the integer quotient.
    numerator = y.mul_(gain.to(torch.float64)).add_(r * 4096 + (r / 2).floor_())
    quotient = numerator.div_(r).floor_().sub_(4096)
    return quotient.clamp_(-INT8_LIMIT, INT8_LIMIT).to(torch.float32)


def lookup(index: Tensor, table: Tensor) -> Tensor:
    """Return table[index + 128] for index int32 [...] in [-127, 127] and table float32 [256]."""
    return table.index_select(0, (index + 128).flatten()).view(index.shape)


def softmax_weights_(scores: Tensor) -> Tensor:
    """Turn scores into 7-bit softmax weights over the last axis, in place.

    ``scores`` is float32 [..., n]: multiples of 2^-12 below 2^21 whose floors are the integer
    scores. With d = max - score, the weight is WEIGHT_TABLE[d], or 0 for d >= 128. Returns float32
    integers.
    """
    scores.floor_()
    scores.sub_(scores.amax(-1, keepdim=True))
    # 126.61 * 2^(-d/16) stays 0.005 away from half-integers, so rounding an exp2 of more than 16
    # bits gives the table; ``self_test`` checks every d. Indexing the table is much slower.
    scores.mul_(1.0 / SCORE_STEPS).clamp_(min=-16.0)
    return scores.exp2_().mul_(WEIGHT_AMPLITUDE).round_()


def attention_mean(weighted: Tensor, weight_sum: Tensor, gain_bits: int) -> Tensor:
    """Return the weighted mean of values times 2^g, rounded to the range of int8.

    g = ``gain_bits`` is in 0 ... 5. ``weighted`` [..., n] holds float32 integers with
    |weighted| <= 127 * weight_sum. ``weight_sum`` [..., 1] holds float32 integers in
    127 ... 1040 * 127. With
        q = floor((weighted * 2^g + weight_sum * 2^(7+g) + floor(weight_sum / 2)) / weight_sum)
    the result is clamp(q - 2^(7+g), -127, 127). The numerator is in [0, 2^31).
    Returns float32 integers [..., n].
    """
    total = weight_sum.to(torch.float64)
    offset = float(2 ** (7 + gain_bits))
    numerator = weighted.to(torch.float64) * float(2**gain_bits)
    numerator.add_(total * offset + (total / 2).floor_())
    quotient = numerator.div_(total).floor_().sub_(offset)
    return quotient.clamp_(-INT8_LIMIT, INT8_LIMIT).to(torch.float32)
