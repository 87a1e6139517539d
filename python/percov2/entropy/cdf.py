"""Integer logits to integer intervals: the torch form, on any device.

With d = max(logits) - logit in 1/256 of an octave, the weight of a symbol is
``w = table[d & 255] >> (d >> 8)`` (22 bits; 0 from 22 octaves on). With prefix sums P, total S,
M = 2^prob_bits and V symbols, ``start_i = floor(P_i * (M - V) / S) + i``: strictly increasing from
0 to M, so every symbol has at least one slot and a single interval needs no table. All numbers are
integers, w < 2^22, S < 2^35 and P * (M - V) < 2^55. The compiled form is percov2.entropy.rans;
on CUDA devices ``intervals`` is one Triton kernel where triton is installed.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

MIN_PROB_BITS = 8
MAX_PROB_BITS = 20
MIN_CODEBOOK = 2
MAX_CODEBOOK = 8192

# round(2^(22 - k/256)); entry 0 is one less, so that 1024 weights sum to less than 2^32.
# Part of the format: these integers never change.
# fmt: off
WEIGHT_TABLE: tuple[int, ...] = (
    4194303, 4182963, 4171652, 4160372, 4149123, 4137904, 4126715, 4115557, 4104429, 4093331,
    4082262, 4071224, 4060216, 4049237, 4038288, 4027369, 4016479, 4005619, 3994788, 3983986,
    3973214, 3962470, 3951756, 3941071, 3930414, 3919787, 3909188, 3898618, 3888076, 3877563,
    3867078, 3856622, 3846194, 3835794, 3825422, 3815078, 3804763, 3794475, 3784215, 3773982,
    3763778, 3753601, 3743451, 3733329, 3723234, 3713167, 3703127, 3693114, 3683128, 3673169,
    3663237, 3653332, 3643453, 3633601, 3623776, 3613978, 3604206, 3594460, 3584741, 3575048,
    3565381, 3555741, 3546126, 3536538, 3526975, 3517438, 3507927, 3498442, 3488983, 3479549,
    3470140, 3460757, 3451399, 3442067, 3432760, 3423478, 3414221, 3404989, 3395782, 3386600,
    3377443, 3368311, 3359203, 3350120, 3341061, 3332027, 3323018, 3314032, 3305071, 3296135,
    3287222, 3278334, 3269469, 3260629, 3251812, 3243019, 3234251, 3225505, 3216784, 3208086,
    3199411, 3190760, 3182133, 3173528, 3164947, 3156389, 3147855, 3139343, 3130854, 3122389,
    3113946, 3105526, 3097129, 3088754, 3080403, 3072073, 3063767, 3055482, 3047221, 3038981,
    3030764, 3022569, 3014396, 3006245, 2998116, 2990010, 2981925, 2973862, 2965821, 2957801,
    2949804, 2941828, 2933873, 2925940, 2918028, 2910138, 2902269, 2894422, 2886595, 2878790,
    2871006, 2863243, 2855501, 2847780, 2840080, 2832400, 2824742, 2817104, 2809486, 2801890,
    2794314, 2786758, 2779223, 2771708, 2764213, 2756739, 2749285, 2741851, 2734437, 2727043,
    2719670, 2712316, 2704982, 2697668, 2690373, 2683099, 2675844, 2668609, 2661393, 2654196,
    2647020, 2639862, 2632724, 2625606, 2618506, 2611426, 2604365, 2597323, 2590300, 2583295,
    2576310, 2569344, 2562397, 2555468, 2548558, 2541667, 2534795, 2527941, 2521105, 2514288,
    2507490, 2500710, 2493948, 2487205, 2480479, 2473772, 2467083, 2460412, 2453760, 2447125,
    2440508, 2433909, 2427328, 2420764, 2414219, 2407691, 2401181, 2394688, 2388213, 2381755,
    2375315, 2368892, 2362487, 2356099, 2349728, 2343375, 2337038, 2330719, 2324417, 2318132,
    2311864, 2305613, 2299378, 2293161, 2286960, 2280777, 2274610, 2268459, 2262325, 2256208,
    2250108, 2244023, 2237956, 2231904, 2225869, 2219851, 2213848, 2207862, 2201892, 2195939,
    2190001, 2184079, 2178174, 2172284, 2166410, 2160552, 2154710, 2148884, 2143074, 2137279,
    2131500, 2125736, 2119988, 2114256, 2108539, 2102838,
)
# fmt: on


_STEPS_PER_NAT = 369.329925537109375  # 256 / ln 2 in float32


def default_prob_bits(codebook_size: int) -> int:
    """Precision used for a codebook: 16 bits up to 256 entries, 18 up to 1024, 20 above.

    Raises ValueError unless 2 <= codebook_size <= 8192.

    >>> default_prob_bits(256), default_prob_bits(1024), default_prob_bits(1025)
    (16, 18, 20)
    """
    if not MIN_CODEBOOK <= codebook_size <= MAX_CODEBOOK:
        raise ValueError(f"the codebook has {codebook_size} entries; it must have 2 to 8192")
    if codebook_size <= 256:
        return 16
    return 18 if codebook_size <= 1024 else 20


def check_precision(codebook_size: int, prob_bits: int) -> None:
    """Raise ValueError unless 2 <= V <= 8192, 8 <= prob_bits <= 20 and 2^prob_bits >= 2 V."""
    if not MIN_PROB_BITS <= prob_bits <= MAX_PROB_BITS:
        raise ValueError(f"prob_bits is {prob_bits}; it must be 8 to 20")
    if not MIN_CODEBOOK <= codebook_size <= MAX_CODEBOOK:
        raise ValueError(f"the codebook has {codebook_size} entries; it must have 2 to 8192")
    if 1 << prob_bits < 2 * codebook_size:
        raise ValueError(
            f"prob_bits is {prob_bits}, too few for a codebook of {codebook_size} entries: "
            "2^prob_bits must be at least twice its size"
        )


@cache
def _weight_table(device: torch.device) -> torch.Tensor:
    """WEIGHT_TABLE as int64 [256]; uploaded once, because an upload may wait for the device."""
    with torch.inference_mode(False):  # usable in every later context
        return torch.tensor(WEIGHT_TABLE, dtype=torch.int64).to(device)


@cache
def _kernel_table(device: torch.device) -> torch.Tensor:
    """WEIGHT_TABLE as the kernel reads it: int32 [256]."""
    with torch.inference_mode(False):
        return torch.tensor(WEIGHT_TABLE, dtype=torch.int32).to(device)


def round_logits(logits: torch.Tensor) -> torch.Tensor:
    """Natural-log logits as base-2 logits in 1/256 of an octave below the row's largest.

    float32 or bfloat16 [..., V] -> int16 [..., V]: in float32, ``rint((x - max) * (256 / ln 2))``,
    ties to even, not below -32768. Three operations that IEEE 754 defines to the bit, so equal
    floats give equal integers on every machine. -inf is allowed. Raises ValueError for another
    dtype, an empty last axis, and rows with NaN, +inf or nothing finite.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits have dtype {logits.dtype}; they must be float32 or bfloat16")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; the last axis is the codebook")
    wide = logits.to(torch.float32)
    top = wide.amax(dim=-1, keepdim=True)
    if not torch.isfinite(top).all():  # amax hands NaN on
        raise ValueError("a row of the logits holds NaN or +inf, or nothing finite")
    steps = torch.round((wide - top) * _STEPS_PER_NAT)
    return steps.clamp(min=-32768).to(torch.int16)


def weights(logits: torch.Tensor, sharpness: int = 256) -> torch.Tensor:
    """Weights of the symbols: int16 logits [..., V] -> int64 [..., V] in 0 .. 2^22 - 1.

    What logits lie below the largest is multiplied by sharpness / 256 >= 0 and rounded down. Raises
    ValueError for another dtype or an empty last axis.
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
    """Interval bounds: int16 logits [..., V] -> int32 [..., V + 1], from 0 to 2^prob_bits.

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
    """Whether ``intervals`` is one Triton kernel there: on CUDA devices, if triton is installed.

    Elsewhere it is a dozen torch operators with the same results.
    """
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def intervals(
    logits: torch.Tensor, symbols: torch.Tensor, prob_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Intervals of chosen symbols: logits int16 [..., V], symbols int32 [...] in 0 .. V - 1.

    Returns starts and freqs, int32 [...]; freq >= 1 and start + freq <= 2^prob_bits. A symbol
    outside the codebook is an error of torch's gather on the CPU and undefined on a GPU, where a
    check would have to wait for the device. Raises ValueError for wrong shapes or dtypes.
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
    """``intervals`` that say which symbols lie outside the codebook: their freq is 0.

    Returns int32 [2, ...], starts and freqs. Never waits for a device: who copies the freqs to the
    host finds out there. Arguments and errors as for ``intervals``.
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
