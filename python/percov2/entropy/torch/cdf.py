"""The rule of ``percov2.entropy.cdf``, from integer logits to integer intervals, on any device.

On CUDA devices ``intervals`` is one Triton kernel if triton is installed.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from percov2.entropy.cdf import MAX_CODEBOOK, WEIGHT_TABLE, check_precision

__all__ = ["cdf", "fused", "intervals", "marked_intervals", "round_logits", "weights"]


_STEPS_PER_NAT = 369.329925537109375  # 256 / ln 2 in float32


@cache
def _weight_table(device: torch.device) -> torch.Tensor:
    """Return WEIGHT_TABLE as int64 [256], cached because an upload may wait for the device."""
    with torch.inference_mode(False):  # usable in every later context
        return torch.tensor(WEIGHT_TABLE, dtype=torch.int64).to(device)


@cache
def _kernel_table(device: torch.device) -> torch.Tensor:
    """Return WEIGHT_TABLE as the kernel reads it: int32 [256]."""
    with torch.inference_mode(False):
        return torch.tensor(WEIGHT_TABLE, dtype=torch.int32).to(device)


def round_logits(logits: torch.Tensor) -> torch.Tensor:
    """Return natural-log logits as base-2 logits in 1/256 of an octave below the row's largest.

    The logits are float32 or bfloat16 [..., V], and -inf is allowed. The result is int16 [..., V]:
    ``rint((x - max) * (256 / ln 2))`` in float32, with ties to even, but at least -32768. IEEE 754
    defines these operations to the bit, so equal floats give equal integers on every machine.

    Raises:
        ValueError: another dtype, an empty last axis, or a row with NaN, with +inf or without a
            finite value.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits have dtype {logits.dtype}; they must be float32 or bfloat16")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; the last axis is the codebook")
    wide = logits.to(torch.float32)
    top = wide.amax(dim=-1, keepdim=True)
    if not torch.isfinite(top).all():  # amax returns NaN if there is one
        raise ValueError("a row of the logits holds NaN or +inf, or nothing finite")
    steps = torch.round((wide - top) * _STEPS_PER_NAT)
    return steps.clamp(min=-32768).to(torch.int16)


def weights(logits: torch.Tensor, sharpness: int = 256) -> torch.Tensor:
    """Return the weights of the symbols: int16 logits [..., V] -> int64 [..., V] in 0 .. 2^22 - 1.

    The distance of each logit to the largest logit is multiplied by ``sharpness`` / 256 and rounded
    down. ``sharpness`` must not be negative. ``percov2.entropy.cdf`` has the formula.

    Raises ValueError for another dtype or an empty last axis.
    """
    if logits.dtype != torch.int16:
        raise ValueError(f"logits have dtype {logits.dtype}; they must be torch.int16")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; the last axis is the codebook")
    wide = logits.to(torch.int64)
    difference = wide.amax(dim=-1, keepdim=True) - wide
    if sharpness != 256:
        difference = difference * sharpness >> 8
    table = _weight_table(logits.device)
    # A shift by 22 or more gives 0; the clamp keeps every shift below 63.
    return table[difference & 255] >> (difference >> 8).clamp(max=31)


def cdf(logits: torch.Tensor, prob_bits: int) -> torch.Tensor:
    """Return the interval bounds, 0 to 2^prob_bits: int16 logits [..., V] -> int32 [..., V + 1].

    Raises ValueError for a wrong dtype, codebook size or precision.

    >>> cdf(torch.tensor([0, -256, -512], dtype=torch.int16), prob_bits=8)  # 4 : 2 : 1
    tensor([  0, 145, 218, 256], dtype=torch.int32)
    """
    symbol_weights = weights(logits)
    size = logits.shape[-1]
    check_precision(size, prob_bits)
    prefix = torch.nn.functional.pad(symbol_weights.cumsum(dim=-1), (1, 0))
    index = torch.arange(size + 1, device=logits.device)
    spread = (1 << prob_bits) - size
    # No operand is negative, so floor division means the same everywhere.
    return ((prefix * spread) // prefix[..., -1:] + index).to(torch.int32)


def fused(device: torch.device) -> bool:
    """Return True if ``intervals`` is one Triton kernel on ``device``.

    This is so on CUDA devices if triton is installed.
    """
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def intervals(
    logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the intervals of symbols, with freq >= 1 and start + freq <= 2^prob_bits.

    Args:
        logits: int16 [..., V].
        symbols: int32 [...] in 0 .. V - 1. A symbol outside the codebook is an error on the CPU. On
            a GPU its interval is undefined, because a check would wait for the device.
        prob_bits: precision of the intervals, 8 to 20.

    Returns:
        (starts, freqs), int32 [...].

    Raises:
        ValueError: a wrong shape or dtype.
    """
    _check_symbols(logits, symbols)
    if fused(logits.device):
        starts, freqs = _fused_intervals(logits, symbols, prob_bits)
        return starts, freqs
    bounds = cdf(logits, prob_bits)
    index = symbols.to(torch.int64).unsqueeze(-1)
    starts = bounds.gather(-1, index).squeeze(-1)
    return starts, bounds.gather(-1, index + 1).squeeze(-1) - starts


def marked_intervals(logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int) -> torch.Tensor:
    """Return starts and freqs as int32 [2, ...], with freq 0 for symbols outside the codebook.

    This never waits for a device. The arguments and errors are those of ``intervals``.
    """
    _check_symbols(logits, symbols)
    if fused(logits.device):
        return _fused_intervals(logits, symbols, prob_bits)
    known = symbols.clamp(0, logits.shape[-1] - 1)
    starts, freqs = intervals(logits, known, prob_bits)
    return torch.stack([starts, freqs * (known == symbols)])


def _check_symbols(logits: torch.Tensor, symbols: torch.Tensor) -> None:
    if symbols.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"symbols have dtype {symbols.dtype}; they must be torch.int32")
    if symbols.shape != logits.shape[:-1]:
        raise ValueError(
            f"symbols have shape {tuple(symbols.shape)} for logits of {tuple(logits.shape)}; "
            "there must be one symbol for each row of logits"
        )


def _fused_intervals(logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int) -> torch.Tensor:
    from percov2.triton_kernels import symbol_intervals

    if logits.dtype != torch.int16:
        raise ValueError(f"logits have dtype {logits.dtype}; they must be torch.int16")
    check_precision(logits.shape[-1] if logits.dim() else 0, prob_bits)
    known = symbols.clamp(-1, MAX_CODEBOOK) if symbols.dtype == torch.int64 else symbols
    return symbol_intervals(logits, known.to(torch.int32), prob_bits, _kernel_table(logits.device))
