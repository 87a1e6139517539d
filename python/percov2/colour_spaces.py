"""Colour spaces that a picture's container declares: ICC profiles from primaries and a curve.

Code points are those of ITU-T H.273, which PNG's cICP and AVIF's nclx use.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ADOBE_RGB",
    "SRGB",
    "UNSPECIFIED",
    "ColourSpace",
    "Curve",
    "from_cicp",
    "from_gamma",
    "icc_profile",
    "is_known",
    "refuse_hdr",
    "to_srgb_levels",
]

Curve = tuple[float, ...]
"""Parameters of an ICC parametric curve: (g) or (g, a, b, c, d)."""

_SRGB_CURVE: Curve = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709_CURVE: Curve = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
_CURVES: dict[int, Curve] = {
    1: _BT709_CURVE,
    4: (2.2,),
    5: (2.8,),
    6: _BT709_CURVE,
    8: (1.0,),
    13: _SRGB_CURVE,
    14: _BT709_CURVE,
    15: _BT709_CURVE,
}
"""Transfer characteristics."""
_HDR = {16: "PQ", 18: "HLG"}
_D65, _C, _DCI = (0.3127, 0.3290), (0.310, 0.316), (0.314, 0.351)
_PRIMARIES: dict[int, tuple[float, ...]] = {
    1: (*_D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060),
    4: (*_C, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    8: (*_C, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (*_DCI, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*_D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
"""White, red, green and blue as x, y."""
UNSPECIFIED = (2, 2)
"""Primaries and transfer that say nothing."""
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


class ColourSpace(NamedTuple):
    """Chromaticities (x, y of white, red, green, blue) and the curve to linear light."""

    chromaticities: tuple[float, ...]
    curve: Curve


SRGB = ColourSpace(_PRIMARIES[1], _SRGB_CURVE)
ADOBE_RGB = ColourSpace((*_D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), (563 / 256,))


def from_cicp(primaries: int, transfer: int) -> ColourSpace:
    """Return the space of code points; unspecified ones (2) mean sRGB.

    Raises:
        ValueError: high dynamic range, or a code point without a known meaning.
    """
    refuse_hdr(transfer)
    known = {**_PRIMARIES, 2: SRGB.chromaticities}
    curves = {**_CURVES, 2: SRGB.curve}
    if not is_known(primaries, transfer):
        raise ValueError(
            f"the picture's colours have primaries {primaries} and transfer {transfer} of H.273, "
            "which percov2 does not know; convert it to sRGB first"
        )
    return ColourSpace(known[primaries], curves[transfer])


def is_known(primaries: int, transfer: int) -> bool:
    """Return True if code points have a meaning, among them the unspecified ones (2)."""
    return primaries in (*_PRIMARIES, 2) and transfer in (*_CURVES, 2)


def refuse_hdr(transfer: int) -> None:
    """Raise ValueError for the transfer of a high dynamic range."""
    if transfer in _HDR:
        raise ValueError(
            f"the picture has a high dynamic range ({_HDR[transfer]}), which 8-bit sRGB cannot "
            "hold; convert it to sRGB with a tone mapping of your choice first"
        )


def from_gamma(gamma: float | None, chromaticities: tuple[float, ...] | None) -> ColourSpace:
    """Return the space of PNG's gAMA (the encoding exponent) and cHRM, or sRGB's where missing.

    Zeros say nothing.

    Raises:
        ValueError: an exponent out of any use, or impossible chromaticities.
    """
    gamma = gamma or None
    if chromaticities is not None and not any(chromaticities):
        chromaticities = None
    plain = chromaticities is None or np.allclose(chromaticities, SRGB.chromaticities, atol=1e-3)
    if plain and (gamma is None or abs(gamma - 1 / 2.2) < 1e-4):
        return SRGB  # what writers of sRGB say who leave out the chunk of that name
    curve = SRGB.curve
    if gamma is not None:
        if not 0.01 <= gamma <= 10:
            raise ValueError(f"the picture has a gamma of {gamma}")
        curve = (1 / gamma,)
    return ColourSpace(chromaticities or SRGB.chromaticities, curve)


def icc_profile(space: ColourSpace) -> bytes:
    """Return an ICC profile (version 4, matrix and curves) of a colour space.

    Raises:
        ValueError: chromaticities that span no colours.
    """
    matrix = _to_d50(space.chromaticities)
    curve = _curve_tag(space.curve)
    tags = {b"wtpt": _xyz_tag(_D50)}
    for name, column in zip((b"r", b"g", b"b"), matrix.T, strict=True):
        tags |= {name + b"XYZ": _xyz_tag(column), name + b"TRC": curve}
    offset = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"", 0x04000000, b"mntr", b"RGB ", b"XYZ "
    )
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _fixed(_D50)
    return header.ljust(128, b"\0") + table + body


def _to_d50(chromaticities: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the matrix of linear RGB to XYZ, adapted from its white to D50 (Bradford)."""
    pairs = np.asarray(chromaticities, float).reshape(4, 2)
    if not np.isfinite(pairs).all() or (pairs[:, 1] <= 0).any():
        raise ValueError(f"the picture has impossible chromaticities {pairs.tolist()}")
    xyz = np.stack([pairs[:, 0], pairs[:, 1], 1 - pairs.sum(1)]) / pairs[:, 1]
    white, primaries = xyz[:, 0], xyz[:, 1:]
    if abs(np.linalg.det(primaries)) < 1e-6:
        raise ValueError(f"the picture has impossible chromaticities {pairs.tolist()}")
    matrix = primaries * np.linalg.solve(primaries, white)
    cones = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    adapted: NDArray[np.float64] = np.linalg.solve(_BRADFORD, cones[:, None] * _BRADFORD) @ matrix
    return adapted


def _fixed(values: NDArray[np.float64]) -> bytes:
    return np.rint(values * 65536).astype(">i4").tobytes()


def _xyz_tag(values: NDArray[np.float64]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(values)


def _curve_tag(curve: Curve) -> bytes:
    """Return a parametric curve: type 0 is x^g, type 3 has a linear part near black."""
    kind = 0 if len(curve) == 1 else 3
    return b"para" + bytes(4) + struct.pack(">HH", kind, 0) + _fixed(np.array(curve))


def to_srgb_levels(values: NDArray[np.float64], curve: Curve) -> NDArray[np.uint8]:
    """Return grey samples in [0, 1] as 8-bit sRGB, rounded once."""
    linear = _linear(values, curve)
    power, scale, offset, slope, edge = SRGB.curve
    knee = edge * slope
    encoded = np.where(linear < knee, linear / slope, (linear ** (1 / power) - offset) / scale)
    return np.rint(encoded * 255).clip(0, 255).astype(np.uint8)


def _linear(values: NDArray[np.float64], curve: Curve) -> NDArray[np.float64]:
    if len(curve) == 1:
        return values ** curve[0]
    power, scale, offset, slope, edge = curve
    return np.where(values < edge, slope * values, (scale * values + offset) ** power)
