"""Rounding of float parameters to the entropy model's integers, with straight-through gradients.

Training and export call the same functions, so training simulates the exported model. Each output
channel's multiplier is chosen first and rounded up to multiplier / 2^shift. The channel's weight
scale follows from it, so requantization adds no error of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from percov2.entropy import ranges

__all__ = [
    "LOGIT_SCALE",
    "RESIDUAL_SCALE",
    "SCORE_SCALE",
    "ActivationRange",
    "QuantizedLinear",
    "integer_gain",
    "mean_gain_bits",
    "multiplier_and_shift",
    "round_to_int8",
    "score_scales",
]


RESIDUAL_SCALE = 2.0**-12
"""Unit of the integer residual stream and of the embeddings."""
LOGIT_SCALE = math.log(2.0) / ranges.LOGIT_STEPS
"""Unit of the integer logits, in nats."""
SCORE_SCALE = math.log(2.0) / ranges.SCORE_STEPS
"""Unit of the integer attention scores, in nats."""
_MOMENTUM = 0.9
_FLOOR = 1e-6


class ActivationRange(nn.Module):
    """The running magnitude and the int8 scale of each of the ``channels`` of an activation."""

    amax: Tensor

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.register_buffer("amax", torch.zeros(channels))

    @torch.no_grad()
    def observe(self, magnitude: Tensor) -> None:
        """Move the range towards the largest magnitudes of a batch, float [channels]."""
        fresh = magnitude.to(torch.float32)
        # The first batch sets the range; later batches move it.
        self.amax.copy_(torch.where(self.amax > 0, self.amax.lerp(fresh, 1 - _MOMENTUM), fresh))

    @property
    def scale(self) -> Tensor:
        """Return the value of one integer step in each channel, float32 [channels]."""
        return self.amax.clamp(min=_FLOOR) / ranges.INT8_LIMIT


class _RoundToInt8(torch.autograd.Function):
    """Fake quantization. Its forward pass is seven times as fast as torch's on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        limit = ranges.INT8_LIMIT
        ctx.save_for_backward(x, scale)
        return (x / scale).round_().clamp_(-limit, limit).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        return grads[0] * (x.abs() <= scale * ranges.INT8_LIMIT), None


def round_to_int8(x: Tensor, scale: Tensor) -> Tensor:
    """Return x rounded to scale * (-127 ... 127). Gradients pass inside that range.

    ``x`` is float [..., n]. ``scale`` is float [1], or [n] with one scale for each channel of the
    last axis.
    """
    return _RoundToInt8.apply(x, scale)


def multiplier_and_shift(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return the multiplier and shift, int32 [n], of the smallest multiplier / 2^shift >= ratio.

    The ratios are float64 [n] and positive. The multipliers are 1 to 127 and the shifts 1 to 24.
    Raises ValueError for a ratio above 127 / 2.
    """
    if float(ratio.max()) > ranges.MAX_MULTIPLIER / 2:
        raise ValueError(
            f"an output of a layer grows by {float(ratio.max()):.1f} units per step, more than "
            "63.5; its weights are too large for the integer residual stream"
        )
    shift = torch.floor(torch.log2(ranges.MAX_MULTIPLIER / ratio)).clamp(1, ranges.MAX_SHIFT)
    multiplier = torch.ceil(ratio * torch.exp2(shift)).clamp(1, ranges.MAX_MULTIPLIER)
    return multiplier.to(torch.int32), shift.to(torch.int32)


class QuantizedLinear(nn.Linear):
    """A linear layer that can be converted to integer weights."""

    @torch.no_grad()
    def integers(self, in_scale: float, out_scale: Tensor) -> dict[str, Tensor]:
        """Return weight int8 [n, K], bias int32 [n], multiplier int8 [n] and shift int8 [n].

        ``in_scale`` is the value of one step of the input. ``out_scale``, float [1] or [n], is the
        value of one step of the output.
        """
        weight = self.weight.to(torch.float64)
        outputs = out_scale.to(torch.float64).expand(len(weight))
        largest = weight.abs().amax(1).clamp(min=_FLOOR * _FLOOR)
        multiplier, shift = multiplier_and_shift(largest * in_scale / (ranges.INT8_LIMIT * outputs))
        weight_scale = multiplier * torch.exp2(-shift.to(torch.float64)) * outputs / in_scale
        limit = ranges.INT8_LIMIT
        rounded = torch.round(weight / weight_scale[:, None]).clamp_(-limit, limit)
        # A larger bias could push the sum beyond 24 bits; outputs saturate far below it.
        room = ranges.ACC_LIMIT - 1 - limit * rounded.abs().sum(1)
        bias = torch.round(self.bias.to(torch.float64) / (weight_scale * in_scale))
        return {
            "weight": rounded.to(torch.int8),
            "bias": torch.minimum(torch.maximum(bias, -room), room).to(torch.int32),
            "multiplier": multiplier.to(torch.int8),
            "shift": shift.to(torch.int8),
        }

    def rounded(self, x: Tensor, in_scale: float, out_scale: Tensor) -> Tensor:
        """Return the unrounded output of the rounded map, with straight-through gradients."""
        with torch.no_grad():
            integers = self.integers(in_scale, out_scale)
            step = (
                integers["multiplier"].to(torch.float64)
                * torch.exp2(-integers["shift"].to(torch.float64))
                * out_scale.to(torch.float64).expand(len(self.weight))
            )
            weight_error = (integers["weight"] * (step / in_scale)[:, None]).float() - self.weight
            bias_error = (integers["bias"] * step).float() - self.bias
        return nn.functional.linear(x, self.weight + weight_error, self.bias + bias_error)


def integer_gain(gain: Tensor, out_scale: float) -> Tensor:
    """Return a LayerNorm gain, float [d], as int16 [d].

    ``out_scale`` is the value of one step of the output.
    """
    steps = torch.round(gain.detach().to(torch.float64) * (ranges.GAIN_STEPS / out_scale))
    return steps.clamp(-ranges.MAX_GAIN, ranges.MAX_GAIN).to(torch.int16)


def score_scales(q_amax: Tensor, k_amax: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales of q and k whose products become attention scores by a shift alone.

    ``q_amax`` and ``k_amax`` are float [heads]. Returns the scale of q and the scale of k, float32
    [heads], and the shift, int32 [heads]. They satisfy
    q_scale * k_scale / sqrt(head_dim) = SCORE_SCALE * 2^-shift.
    """
    limit = ranges.INT8_LIMIT
    q = q_amax.to(torch.float64).clamp(min=_FLOOR) / limit
    k = k_amax.to(torch.float64).clamp(min=_FLOOR) / limit
    ratio = q * k / (math.sqrt(head_dim) * SCORE_SCALE)
    shift = torch.floor(-torch.log2(ratio))
    shift = shift.clamp(ranges.SCORE_SHIFT_MIN, ranges.SCORE_SHIFT_MAX)
    # Both scales grow by the same factor, at most 2^(1/2) while the shift is inside its range.
    growth = torch.sqrt(torch.exp2(-shift) / ratio)
    return (q * growth).float(), (k * growth).float(), shift.to(torch.int32)


def mean_gain_bits(value_amax: float, mean_amax: float) -> int:
    """Return the number of bits, 0 to 5, by which a weighted mean can grow and still fit int8."""
    if mean_amax <= 0 or value_amax <= mean_amax:
        return 0
    return min(int(math.log2(value_amax / mean_amax)), ranges.MAX_GAIN_BITS)
