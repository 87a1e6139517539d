"""WebDataset shards of random photos."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shard(path: Path, count: int, seed: int, side: int = 48) -> None:
    """Photos "<seed>-<i>" of random pixels; every second one has two captions."""
    generator = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            size = (side + int(generator.integers(20)), side + int(generator.integers(20)), 3)
            out = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(out, "png")
            add_member(tar, f"{seed}-{i}.png", out.getvalue())
            if i % 2:
                add_member(tar, f"{seed}-{i}.txt", b"a door\na red door\n")
