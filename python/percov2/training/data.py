"""Training photographs: WebDataset shards, decoded once into a memory-mapped byte array.

WebP decoding would cost more than a training step, so the shards are decoded once; crops are then
slices of a memory map. The cache is two files: ``photos.bin`` (uint8, RGB, photo after photo) and
``photos.json`` (shapes, offsets, captions).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Photo:
    """One decoded photo: where it lies in the memory map and what is known about it."""

    key: str
    offset: int
    height: int
    width: int
    captions: tuple[str, ...]


def decode_shards(shards: list[Path], cache: Path) -> None:
    """Decode WebDataset shards into ``cache/photos.bin`` and ``cache/photos.json``.

    Args:
        shards: ``.tar`` files with members ``<key>.webp|jpg|png`` and, optionally, ``<key>.txt``
            holding one caption a line.
        cache: folder to write; finished caches are left as they are.

    Raises:
        ValueError: when no shard is given or a shard holds no photo.
    """
    import webdataset as wds

    if (cache / "photos.json").is_file():
        return
    if not shards:
        raise ValueError("no .tar shards to decode; pass a folder that holds WebDataset shards")
    cache.mkdir(parents=True, exist_ok=True)
    entries: list[list[Any]] = []
    offset = 0
    with open(cache / "photos.bin.part", "wb") as out:
        for shard in tqdm(shards, desc="decoding shards", unit="shard"):
            before = len(entries)
            for sample in wds.WebDataset(str(shard), shardshuffle=False):
                data = next((sample[e] for e in ("webp", "jpg", "png") if e in sample), None)
                if data is None:
                    continue
                pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                lines = sample.get("txt", b"").decode("utf-8").splitlines()
                captions = [line.strip() for line in lines if line.strip()]
                entries.append([sample["__key__"], offset, *pixels.shape[:2], captions])
                out.write(pixels.tobytes())
                offset += pixels.size
            if len(entries) == before:
                raise ValueError(f"{shard.name} holds no .webp, .jpg or .png photo")
    (cache / "photos.json.part").write_text(json.dumps(entries))
    os.replace(cache / "photos.bin.part", cache / "photos.bin")
    os.replace(cache / "photos.json.part", cache / "photos.json")


_HELD_OUT_OF_256 = 22
PARTS = ("training", "held out", "all")


def is_held_out(key: str) -> bool:
    """Whether the photo of this key is never trained on, in any phase: 8.6 % of all keys.

    It is if the first byte of the key's SHA-256 is below 22: whatever else a data set holds.
    """
    return hashlib.sha256(key.encode()).digest()[0] < _HELD_OUT_OF_256


class PhotoCrops:
    """Random crops at native resolution from a decoded cache.

    Photos are drawn with probability proportional to the square root of their pixel count, so that
    the larger, sharper photos are not drowned by many small ones.

    Args:
        cache: what ``decode_shards`` wrote.
        part: "training", "held out" (``is_held_out``) or "all" photos.

    Raises:
        ValueError: no cache, an unknown part, or one without photos.
    """

    def __init__(self, cache: Path, part: str = "training") -> None:
        if part not in PARTS:
            raise ValueError(f"part is {part!r}; it must be one of {PARTS}")
        if not (cache / "photos.json").is_file():
            raise ValueError(f"{cache} holds no photos.json; run `percov2 train data` first")
        entries = json.loads((cache / "photos.json").read_text())
        photos = [Photo(k, o, h, w, tuple(c)) for k, o, h, w, c in entries]
        self.photos = [
            p for p in photos if part == "all" or is_held_out(p.key) == (part == "held out")
        ]
        if not self.photos:
            raise ValueError(f"{part} photos: {cache} holds none among its {len(photos)}")
        self._pixels = np.memmap(cache / "photos.bin", dtype=np.uint8, mode="r")
        self._weights = np.sqrt([p.height * p.width for p in self.photos])

    def with_captions(self) -> PhotoCrops:
        """The same without photos that have no caption; ValueError if none is left."""
        chosen = copy.copy(self)
        chosen.photos = [photo for photo in self.photos if photo.captions]
        if not chosen.photos:
            raise ValueError("none of these photos has a caption")
        chosen._weights = np.sqrt([p.height * p.width for p in chosen.photos])
        return chosen

    def pixels(self, photo: Photo) -> np.ndarray:
        """The photo's uint8 pixels [H, W, 3], a view of the memory map."""
        size = photo.height * photo.width * 3
        flat = self._pixels[photo.offset : photo.offset + size]
        return flat.reshape(photo.height, photo.width, 3)

    def batch(
        self, generator: np.random.Generator, count: int, side: int
    ) -> tuple[Tensor, list[str]]:
        """Draw ``count`` square crops.

        Returns:
            Images float32 [count, 3, side, side] in [-1, 1] (channels last), and one caption per
            crop ("" where the photo has none).

        Raises:
            ValueError: when no photo is at least ``side`` pixels on both sides.
        """
        fits = np.array([min(p.height, p.width) >= side for p in self.photos])
        if not fits.any():
            raise ValueError(f"no photo is at least {side}x{side} pixels; use a smaller crop")
        weights = self._weights * fits
        chosen = generator.choice(len(self.photos), size=count, p=weights / weights.sum())
        crops = np.empty((count, side, side, 3), np.uint8)
        captions = []
        for i, index in enumerate(chosen):
            photo = self.photos[index]
            top = generator.integers(photo.height - side + 1)
            left = generator.integers(photo.width - side + 1)
            crop = self.pixels(photo)[top : top + side, left : left + side]
            crops[i] = crop[:, ::-1] if generator.integers(2) else crop
            captions.append(str(generator.choice(photo.captions)) if photo.captions else "")
        images = torch.from_numpy(crops).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        return images, captions


@dataclass(frozen=True)
class CropPlan:
    """Crop sides and how many crops of each side make a batch; one side is drawn per step.

    Raises:
        ValueError: when there is not one positive count per positive side.
    """

    sides: tuple[int, ...] = (128, 192, 256)
    counts: tuple[int, ...] = (16, 8, 4)

    def __post_init__(self) -> None:
        if not self.sides or len(self.sides) != len(self.counts):
            raise ValueError(f"crops need one count per side, not {self.sides} and {self.counts}")
        if min(*self.sides, *self.counts) < 1:
            raise ValueError(f"crops need positive sides and counts: {self.sides}, {self.counts}")

    def draw(self, data: PhotoCrops, generator: np.random.Generator) -> tuple[Tensor, list[str]]:
        """A batch of crops of one side: images [B, 3, S, S] in [-1, 1], and captions."""
        pick = int(generator.integers(len(self.sides)))
        images, captions = data.batch(generator, self.counts[pick], self.sides[pick])
        return images.contiguous(memory_format=torch.channels_last), captions
