"""Attention of the training form: forward and backward, image by image.

The scores of one image with four heads and a 16 x 16 crop take about 2 MB. The scores of a whole
batch would pass through main memory ten times per layer. Therefore this module works on one image
at a time, which fits in cache. The backward pass recomputes the weights, so none are stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from percov2.entropy import ranges
from percov2.entropy.torch import intmath

__all__ = ["window_attention"]


def _weights(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor, rounded: bool) -> Tensor:
    """Return the attention weights [H, E, K] of one image. Each row sums to 1."""
    scores = torch.bmm(q, k.transpose(1, 2)).add_(bias).add_(mask)
    if not rounded:
        return torch.softmax(scores, -1)
    weights = intmath.softmax_weights_(scores.add_(0.5))
    return weights.div_(weights.sum(-1, keepdim=True))


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, rounded: bool
    ) -> Tensor:
        out = torch.empty_like(q)
        for b in range(len(q)):
            torch.bmm(_weights(q[b], k[b], bias, mask[b], rounded), v[b], out=out[b])
        ctx.save_for_backward(q, k, v, bias, mask, out)
        ctx.rounded = rounded
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask, out = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_bias = torch.zeros_like(bias)
        for b in range(len(q)):
            weights = _weights(q[b], k[b], bias, mask[b], ctx.rounded)
            torch.bmm(weights.transpose(1, 2), grad[b], out=grad_v[b])
            scores = torch.bmm(grad[b], v[b].transpose(1, 2))
            scores.sub_((grad[b] * out[b]).sum(-1, keepdim=True)).mul_(weights)
            if ctx.rounded:
                # Rounded scores count sixteenths of an octave, not nats.
                scores.mul_(math.log(2.0) / ranges.SCORE_STEPS)
            grad_bias.add_(scores)
            torch.bmm(scores, k[b], out=grad_q[b])
            torch.bmm(scores.transpose(1, 2), q[b], out=grad_k[b])
        return grad_q, grad_k, grad_v, grad_bias, None, None


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, rounded: bool
) -> Tensor:
    """Return the weighted means of the values, float32 [B, H, E, D].

    Args:
        q: float32 [B, H, E, D], already scaled.
        k, v: float32 [B, H, K, D].
        bias: float32 [H, E, K]. These are integers if ``rounded`` is True.
        mask: float32 [B, E, K], HIDDEN_SCORE for hidden keys and 0 elsewhere, with at least one 0
            per row. (Adding a mask is 30 times as fast as filling the scores.)
        rounded: True for scores in sixteenths of an octave and the weights of the integer program;
            False for scores in nats.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _WindowAttention.apply(q, k, v, bias, mask, rounded)
