"""WebDataset shards of random photos."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def png(pixels: np.ndarray | Image.Image) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, "png")
    return out.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shard(path: Path, count: int, seed: int, side: int = 48) -> Path:
    """Photos "<seed>-<i>" of random pixels; every second one has two captions."""
    generator = np.random.default_rng(seed)
    members = {}
    for i in range(count):
        size = (side + int(generator.integers(20)), side + int(generator.integers(20)), 3)
        members[f"{seed}-{i}.png"] = png(generator.integers(0, 256, size, dtype=np.uint8))
        if i % 2:
            members[f"{seed}-{i}.txt"] = b"a door\na red door\n"
    return write_tar(path, members)
