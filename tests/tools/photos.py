"""Pictures of random pixels: alone, as tensors, in shards, and as training stores them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0, block: int = 1) -> Image.Image:
    """Random blocks of ``block`` pixels a side."""
    shape = (height // block, width // block, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Image.fromarray(pixels.repeat(block, 0).repeat(block, 1))


def tensor(image: Image.Image) -> Any:
    """float [1, 3, H, W] in -1 ... 1."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def png(picture: np.ndarray | Image.Image) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(out, "png")
    return out.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shard(path: Path, count: int, seed: int, side: int = 48) -> Path:
    """A shard of photos "<seed>-<i>"; every second one has two captions."""
    generator = np.random.default_rng(seed)
    members = {}
    for i in range(count):
        size = (side + int(generator.integers(20)), side + int(generator.integers(20)), 3)
        members[f"{seed}-{i}.png"] = png(generator.integers(0, 256, size, dtype=np.uint8))
        if i % 2:
            members[f"{seed}-{i}.txt"] = b"a door\na red door\n"
    return write_tar(path, members)


def store_photos(folder: Path, sizes: Sequence[tuple[int, int]], block: int) -> Path:
    """Photos pic-0, pic-1, … of (height, width) as `percov2 train data` stores them; the folder.

    All but the first have a caption.
    """
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    entries, pixels, offset = [], [], 0
    for i, (height, width) in enumerate(sizes):
        shape = (height // block, width // block, 3)
        photo = generator.integers(0, 256, shape, dtype=np.uint8).repeat(block, 0).repeat(block, 1)
        entries.append([f"pic-{i}", offset, height, width, ["a red door"] if i else []])
        pixels.append(photo.tobytes())
        offset += photo.size
    (folder / "photos.bin").write_bytes(b"".join(pixels))
    (folder / "photos.json").write_text(json.dumps(entries))
    return folder
