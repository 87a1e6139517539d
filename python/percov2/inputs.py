"""Inputs of a codec: one picture or file, or several, distinguished by type."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from percov2.images import check_size, decode_image, read_image, to_rgb

if TYPE_CHECKING:
    import torch

__all__ = ["OneFile", "OnePicture", "as_files", "as_pictures", "rgb_array"]


OneFile: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview
"""A path, or the bytes of a file."""
OnePicture: TypeAlias = "OneFile | Image.Image | NDArray[Any] | torch.Tensor"
"""A path, the bytes of an image file, a Pillow image, an array [H, W] or [H, W, 3], a tensor
[C, H, W]."""

_BYTES = (bytes, bytearray, memoryview)
_PICTURES = (
    "a path, the bytes of an image file, a Pillow image, an array [H, W] or [H, W, 3] of uint8, a "
    "tensor [C, H, W], or several of these"
)


def as_pictures(value: Any) -> tuple[bool, list[Any]]:
    """Return (True for one picture, the pictures as a list).

    Raises:
        ValueError: neither a picture nor an iterable with an order.
    """
    if isinstance(value, (str, os.PathLike, *_BYTES, Image.Image)):
        return True, [value]
    if isinstance(value, np.ndarray):
        if value.ndim not in (2, 3, 4):
            raise ValueError(f"a picture must be {_PICTURES}, not an array {value.shape}")
        return value.ndim < 4, [value] if value.ndim < 4 else list(value)
    if _is_tensor(value):
        if value.ndim not in (3, 4):
            raise ValueError(f"a picture must be {_PICTURES}, not a tensor {tuple(value.shape)}")
        return value.ndim == 3, [value] if value.ndim == 3 else list(value)
    return False, _several(value, _PICTURES, "a picture")


def as_files(value: Any) -> tuple[bool, list[bytes]]:
    """Return (True for one ``.pcv2`` file, the bytes of the files).

    Raises:
        ValueError: neither a file nor an iterable of files.
        OSError: a path that cannot be read.
    """
    if isinstance(value, (str, os.PathLike, *_BYTES)):
        return True, [_file(value)]
    kinds = "a path, the bytes of a .pcv2 file, or several of these"
    return False, [_file(one) for one in _several(value, kinds, "a file")]


def _several(value: Any, kinds: str, what: str) -> list[Any]:
    # Sets have no order, files are read by lines, and arrays of bytes lose trailing zeros.
    unfit = isinstance(value, (dict, set, frozenset, np.ndarray)) or _is_tensor(value)
    if unfit or not isinstance(value, Iterable) or hasattr(value, "read"):
        raise ValueError(f"{what} must be {kinds}, not {type(value).__name__}")
    return list(value)


def _file(value: Any) -> bytes:
    if isinstance(value, _BYTES):
        return bytes(value)
    if isinstance(value, (str, os.PathLike)):
        return Path(value).read_bytes()
    raise ValueError(f"a file must be a path or the bytes of one, not {type(value).__name__}")


def rgb_array(picture: Any, max_pixels: int) -> NDArray[np.uint8]:
    """Return one picture as sRGB, uint8 [H, W, 3].

    Args:
        picture: a ``OnePicture``; tensors are uint8, or floats in [0, 1].
        max_pixels: most pixels of a picture; larger ones are refused before decoding.

    Raises:
        ValueError: no picture, or a damaged or too large one.
        OSError: a path that cannot be read.
    """
    if isinstance(picture, (str, os.PathLike)):
        return to_rgb(read_image(os.fspath(picture), max_pixels))
    if isinstance(picture, _BYTES):
        return to_rgb(decode_image(io.BytesIO(bytes(picture)), max_pixels))
    if isinstance(picture, Image.Image):
        check_size(picture.width, picture.height, max_pixels)
        return to_rgb(picture)
    if _is_tensor(picture):
        picture = _pixels(picture)
    if isinstance(picture, np.ndarray):
        picture = np.asarray(picture)  # a matrix would keep two dimensions
        fits = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)
        if picture.dtype != np.uint8 or not fits:
            raise ValueError(
                f"an array must be uint8 [H, W] or [H, W, 3], not {picture.dtype} {picture.shape}"
            )
        check_size(picture.shape[1], picture.shape[0], max_pixels)
        grey = picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, 2)
        return np.ascontiguousarray(grey)
    raise ValueError(f"a picture must be {_PICTURES}, not {type(picture).__name__}")


def _is_tensor(value: Any) -> bool:
    """Return True for a tensor; nobody has one who has not imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _pixels(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return a tensor [C, H, W], uint8 or floats in [0, 1], as uint8 [H, W, C]."""
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ValueError(f"a tensor must be [1, H, W] or [3, H, W], not {tuple(tensor.shape)}")
    if tensor.is_floating_point():
        values = tensor.detach().float()
        if not (values.numel() and bool(((values >= 0) & (values <= 1)).all())):
            raise ValueError("a tensor of floats must lie in 0..1")
        tensor = (values * 255).round().byte()
    if str(tensor.dtype) != "torch.uint8":
        raise ValueError(f"a tensor must be uint8 or floats in 0..1, not {tensor.dtype}")
    array: NDArray[np.uint8] = tensor.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    return array
