"""The format's rule from integer logits to integer intervals.

With d = max(logits) - logit in 1/256 of an octave, the weight of a symbol is
``w = table[d & 255] >> (d >> 8)`` (22 bits; 0 from 22 octaves on). With prefix sums P, total S,
M = 2^prob_bits and V symbols, ``start_i = floor(P_i * (M - V) / S) + i``. The starts increase
strictly from 0 to M, so every symbol has at least one slot, and one interval can be computed
without a table. All numbers are integers, w < 2^22, S < 2^35 and P * (M - V) < 2^55.
``percov2.entropy.rans`` has the compiled form; ``percov2.entropy.torch.cdf`` runs on any device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.ranges import whole_number

__all__ = [
    "MAX_CODEBOOK",
    "MIN_CODEBOOK",
    "WEIGHT_TABLE",
    "check_codebook",
    "check_precision",
    "default_prob_bits",
    "weights",
    "whole_bits",
]


_MIN_PROB_BITS = 8
_MAX_PROB_BITS = 20
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


def check_codebook(codebook_size: Any) -> int:
    """Return the number of entries of a codebook as a plain int.

    Raises ValueError unless it is a whole number and 2 <= codebook_size <= 8192.
    """
    whole = type(codebook_size) is int or isinstance(codebook_size, np.integer)
    if not whole or not MIN_CODEBOOK <= codebook_size <= MAX_CODEBOOK:
        raise ValueError(f"the codebook has {codebook_size} entries; it must have 2 to 8192")
    return int(codebook_size)


def whole_bits(prob_bits: Any) -> int:
    """Return a precision as a plain int. Raise ValueError unless it is a whole number, 8 to 20."""
    return whole_number("prob_bits", prob_bits, _MIN_PROB_BITS, _MAX_PROB_BITS)


def default_prob_bits(codebook_size: int) -> int:
    """Return the precision for a codebook: 16 bits up to 256 entries, 18 up to 1024, 20 above.

    Raises ValueError unless 2 <= codebook_size <= 8192.

    >>> default_prob_bits(256), default_prob_bits(1024), default_prob_bits(1025)
    (16, 18, 20)
    """
    if check_codebook(codebook_size) <= 256:
        return 16
    return 18 if codebook_size <= 1024 else 20


def check_precision(codebook_size: int, prob_bits: int) -> None:
    """Raise ValueError unless the codebook and the precision are valid together.

    They are valid if 2 <= codebook_size <= 8192, 8 <= prob_bits <= 20 and
    2^prob_bits >= 2 * codebook_size.
    """
    if 1 << whole_bits(prob_bits) < 2 * check_codebook(codebook_size):
        raise ValueError(
            f"prob_bits is {prob_bits}, too few for a codebook of {codebook_size} entries: "
            "2^prob_bits must be at least twice its size"
        )


_WEIGHTS = np.array(WEIGHT_TABLE, dtype=np.int64)


def weights(logits: NDArray[np.int16], sharpness: int = 256) -> NDArray[np.int64]:
    """Return the weights of the symbols, int64 [..., V] in 0 .. 2^22 - 1.

    Args:
        logits: int16 [..., V].
        sharpness: not negative. The distance of each logit to the largest logit is multiplied by
            ``sharpness`` / 256 and rounded down.

    Raises:
        ValueError: the logits have another dtype or an empty last axis.
    """
    if logits.dtype != np.int16:
        raise ValueError(f"logits have dtype {logits.dtype}; they must be int16")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {logits.shape}; the last axis is the codebook")
    wide = logits.astype(np.int64)
    difference = wide.max(axis=-1, keepdims=True) - wide
    if sharpness != 256:
        difference = difference * sharpness >> 8
    # A shift by 22 or more gives 0; the limit keeps every shift below 63.
    return _WEIGHTS[difference & 255] >> np.minimum(difference >> 8, 31)
