"""Read and write safetensors files of integer tensors, and fingerprint them.

With this module the entropy engine depends on numpy only. The format is an 8-byte little-endian
header length, a JSON header {name: {dtype, shape, data_offsets}}, then the little-endian bytes
(https://github.com/huggingface/safetensors, "Format"). Only the integer types of the entropy model
are accepted, and every size is checked before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.stored_files import read_regular

__all__ = ["fingerprint", "read_tensors", "write_tensors"]


_MAX_HEADER_BYTES = 1 << 20
_MAX_FILE_BYTES = 1 << 30

_TYPES = {"I8": "<i1", "I16": "<i2", "I32": "<i4"}
_NAMES = {np.dtype(code).newbyteorder("="): name for name, code in _TYPES.items()}


def _little_endian_bytes(tensor: NDArray[Any]) -> bytes:
    """Return the elements of an integer tensor in C order, little-endian."""
    return tensor.astype(_TYPES[_NAMES[tensor.dtype]], copy=False).tobytes()


def write_tensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """Write int8, int16 and int32 tensors to a safetensors file, sorted by name.

    Raises ValueError for another dtype.
    """
    header: dict[str, Any] = {}
    chunks: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}; only int8/16/32 are kept")
        data = _little_endian_bytes(tensor)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        chunks.append(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read a safetensors file of integer tensors.

    Raises ValueError with the path if it is not such a file.
    """
    data = read_regular(path, _MAX_FILE_BYTES)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"{path} is not a safetensors file (header length {length})")
    try:
        header = json.loads(data[8 : 8 + length])
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        return {name: _tensor(data[8 + length :], entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file of integers: {error}") from error


def _tensor(data: bytes, entry: dict[str, Any]) -> NDArray[Any]:
    code = _TYPES[entry["dtype"]]
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape} and offsets {begin}, {end} must be whole numbers")
    size = math.prod(shape) * np.dtype(code).itemsize
    if min(shape, default=1) < 0 or not 0 <= begin <= end <= len(data) or end - begin != size:
        raise ValueError(f"shape {shape} does not match the bytes {begin} to {end}")
    array = np.frombuffer(data[begin:end], dtype=code).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="))


def fingerprint(config: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> bytes:
    """Return the SHA-256 of the canonical bytes of a config and its tensors.

    The bytes begin with the config as JSON (sorted keys, no spaces, ASCII) and a newline. Each
    tensor follows in the order of the names: ``name dtype d0,d1,...`` and a newline (dtype I8, I16
    or I32), then the elements in C order, little-endian.
    """
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digest = hashlib.sha256(text.encode("ascii") + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(str(side) for side in tensor.shape)
        digest.update(f"{name} {_NAMES[tensor.dtype]} {shape}\n".encode("ascii"))
        digest.update(_little_endian_bytes(tensor))
    return digest.digest()
