"""Photos as `percov2 train data` stores them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def store_photos(folder: Path, sizes: Sequence[tuple[int, int]], block: int) -> Path:
    """Random blocks of ``block`` pixels as photos pic-0, pic-1, … of (height, width); the folder.

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
