"""Training photos: WebDataset shards, decoded once into a memory-mapped byte array.

To decode WebP at every step would take longer than the step itself. The cache has two files:
``photos.bin`` (uint8, RGB, photo after photo) and ``photos.json`` (shapes, offsets, captions).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from percov2.datasets.shards import DAMAGE, PLAIN, open_shard, reason_of, samples_of, shards_in
from percov2.images import ENDINGS, decode_image, to_rgb
from percov2.stored_files import one_line

__all__ = [
    "PARTS",
    "PHOTO_ENDINGS",
    "CropPlan",
    "Photo",
    "PhotoCrops",
    "PhotoWarning",
    "captions_ending",
    "decode_shards",
    "found_shards",
    "is_held_out",
    "join_caches",
    "lines_of",
    "photo_ending",
    "photos_of",
    "tell_left_out",
]


@dataclass(frozen=True)
class Photo:
    """A decoded photo: its key, its offset in the memory map, its size and its captions."""

    key: str
    offset: int
    height: int
    width: int
    captions: tuple[str, ...]


PHOTO_ENDINGS = ("webp", "jpg", "jpeg", "png")
"""Endings of photos in a shard, in any case."""
_CAPTIONS = "txt"
_MOST_SKIPPED = 0.1
"""Largest share of damaged photos in a shard."""


class PhotoWarning(UserWarning):
    """A photo or file of a shard or a folder of shards that was skipped."""


def found_shards(folder: Path, endings: tuple[str, ...] = PLAIN) -> list[Path]:
    """Return the shards of a folder by name, with a PhotoWarning of other files.

    Raises:
        ValueError: the folder has no shard, or there is no folder.
    """
    shards, others = shards_in(folder, endings)
    if others:
        names = f"{', '.join(others[:3])}{', …' * (len(others) > 3)}"
        message = f"left out {len(others)} files that are no {' or '.join(endings)}: {names}"
        warnings.warn(f"{folder}: {message}", PhotoWarning, stacklevel=2)
    return shards


def photo_ending(endings: Iterable[str]) -> str | None:
    """Return the ending of a sample's photo, or None without one.

    Of several photos, that of the kind which is first in ``PHOTO_ENDINGS`` counts.
    """
    own = {ending.lower(): ending for ending in endings}
    return next((own[kind] for kind in PHOTO_ENDINGS if kind in own), None)


def captions_ending(endings: Iterable[str]) -> str | None:
    """Return the ending of a sample's captions, or None without any."""
    return next((ending for ending in endings if ending.lower() == _CAPTIONS), None)


def lines_of(text: bytes) -> tuple[str, ...]:
    """Return the captions in a text, one per line; bytes that are no UTF-8 are replaced."""
    lines = (line.strip() for line in text.decode("utf-8", "replace").splitlines())
    return tuple(line for line in lines if line)


def tell_left_out(shard: Path, names: list[str]) -> None:
    """Warn of the pictures among members of a shard that belong to no sample with a photo."""
    pictures = [name for name in names if name.lower().endswith(ENDINGS)]
    if pictures:
        form = f"KEY.{'|'.join(PHOTO_ENDINGS)}, without another dot"
        message = f"pictures left out: {len(pictures)}, such as {pictures[0]}; photos are {form}"
        warnings.warn(f"{shard.name}: {message}", PhotoWarning, stacklevel=3)


def photos_of(shard: Path) -> Iterator[tuple[str, NDArray[np.uint8], tuple[str, ...]]]:
    """Yield the key, the pixels uint8 [H, W, 3] and the captions of every readable photo.

    Raises:
        ValueError: the shard contains no photo or is damaged, or more than a tenth of its photos
            are damaged.

    Warns:
        PhotoWarning: a photo was skipped, or pictures with other names were.
    """
    read, skipped = 0, 0
    others: list[str] = []
    try:
        with open_shard(shard) as tar:
            for sample in samples_of(tar, (*PHOTO_ENDINGS, _CAPTIONS)):
                photo, text = photo_ending(sample.members), captions_ending(sample.members)
                try:
                    if sample.too_large:
                        raise ValueError(sample.too_large)
                    if photo is None:
                        others += sample.others
                        continue
                    pixels = to_rgb(decode_image(io.BytesIO(sample.members[photo])))
                except ValueError as error:
                    skipped += 1
                    message = f"{shard.name}: skipped {sample.key}: {one_line(error)}"
                    warnings.warn(message, PhotoWarning, stacklevel=3)
                    continue
                read += 1
                yield sample.key, pixels, lines_of(sample.members[text] if text else b"")
    except DAMAGE as error:
        reason = reason_of(shard, error)
        raise ValueError(f"{shard.name} is not a tar file, or is damaged: {reason}") from error
    tell_left_out(shard, others)
    if read == 0:
        raise ValueError(f"{shard.name} contains no readable photo ({', '.join(PHOTO_ENDINGS)})")
    if skipped > max(1, _MOST_SKIPPED * (read + skipped)):
        raise ValueError(f"{shard.name}: {skipped} of {read + skipped} photos are damaged")


def decode_shards(shards: list[Path], cache: Path) -> None:
    """Decode WebDataset shards into ``cache/photos.bin`` and ``cache/photos.json``.

    Args:
        shards: ``.tar`` files, also compressed, with members ``<key>.webp|jpg|jpeg|png`` and,
            optionally, ``<key>.txt`` with one caption per line. Photos are converted as
            ``percov2.images.to_rgb`` does.
        cache: folder to write. If it holds a finished cache, nothing is done.

    Raises:
        ValueError: no shard is given, a shard contains no photo or is damaged, or more than a tenth
            of its photos are damaged.

    Warns:
        PhotoWarning: a damaged photo was skipped.
    """
    if (cache / "photos.json").is_file():
        return
    if not shards:
        raise ValueError("no .tar shards to decode; pass a folder of WebDataset shards")
    cache.mkdir(parents=True, exist_ok=True)
    entries: list[list[Any]] = []
    offset = 0
    with _new_pixels(cache, entries) as out:
        for shard in tqdm(shards, desc="decoding shards", unit="shard"):
            for key, pixels, captions in photos_of(shard):
                entries.append([key, offset, *pixels.shape[:2], captions])
                out.write(pixels.tobytes())
                offset += pixels.size


def join_caches(parts: list[Path], cache: Path) -> None:
    """Join caches into ``cache``, as if :func:`decode_shards` had decoded all their shards."""
    cache.mkdir(parents=True, exist_ok=True)
    entries: list[list[Any]] = []
    with _new_pixels(cache, entries) as out:
        for part in parts:
            start = out.tell()
            for photo in _read_photos(part):
                entries.append(
                    [
                        *(photo.key, start + photo.offset, photo.height, photo.width),
                        list(photo.captions),
                    ]
                )
            with open(part / "photos.bin", "rb") as pixels:
                shutil.copyfileobj(pixels, out, 1 << 24)


@contextmanager
def _new_pixels(cache: Path, entries: list[list[Any]]) -> Iterator[BinaryIO]:
    """Open the pixels of a cache, which gets its final names with ``entries`` if nothing fails."""
    parts = pixels, table = cache / "photos.bin.part", cache / "photos.json.part"
    try:
        with open(pixels, "wb") as out:
            yield out
        table.write_text(json.dumps(entries))
        for part in parts:
            os.replace(part, part.with_suffix(""))
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _read_photos(cache: Path) -> list[Photo]:
    """Return the photos of a cache; ValueError if it is damaged or incomplete."""
    photos = []
    try:
        for key, offset, height, width, captions in json.loads((cache / "photos.json").read_text()):
            numbers = (offset, height, width)
            if not all(type(number) is int for number in numbers) or min(height, width, offset) < 0:
                raise ValueError(f"the place of {key!r} is {numbers}")
            photos.append(Photo(str(key), *numbers, tuple(map(str, captions))))
        size = (cache / "photos.bin").stat().st_size
        needed = max((p.offset + 3 * p.height * p.width for p in photos), default=0)
        if size < needed or size == 0:
            raise ValueError(f"photos.bin has {size} of {needed} bytes")
    except (ValueError, TypeError, RecursionError, FileNotFoundError) as error:
        raise ValueError(
            f"{cache} holds no whole cache of photos ({error}); delete it and run "
            "`percov2 train data` again"
        ) from error
    return photos


_HELD_OUT_OF_256 = 22
PARTS = ("training", "held out", "all")


def is_held_out(key: str) -> bool:
    """Return True for 8.6 % of all keys. No phase trains on their photos.

    In any data set, these are the keys whose SHA-256 has a first byte below 22. Bytes of a name
    that are no UTF-8 stand in the key as lone surrogates (``os.fsdecode``).
    """
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[0] < _HELD_OUT_OF_256


class PhotoCrops:
    """Random crops at native resolution from a decoded cache.

    The chance of a photo is proportional to the square root of its number of pixels, so that large,
    sharp photos are drawn more often.

    Args:
        cache: folder written by ``decode_shards``.
        part: "training", "held out" (``is_held_out``) or "all" photos.

    Raises:
        ValueError: there is no cache, the part is unknown, or the part has no photos.
    """

    def __init__(self, cache: Path, part: str = "training") -> None:
        if part not in PARTS:
            raise ValueError(f"part must be one of {PARTS}, not {part!r}")
        if not (cache / "photos.json").is_file():
            raise ValueError(f"{cache} contains no photos.json; run `percov2 train data` first")
        photos = _read_photos(cache)
        self.photos = [
            p for p in photos if part == "all" or is_held_out(p.key) == (part == "held out")
        ]
        if not self.photos:
            raise ValueError(f"{cache} contains no {part} photos among its {len(photos)}")
        self._pixels = np.memmap(cache / "photos.bin", dtype=np.uint8, mode="r")
        self.device = torch.device("cpu")
        self._uploaded: Tensor | None = None
        self._index()

    def _index(self) -> None:
        """Collect the sizes, factors and offsets of all photos in arrays."""
        self._sizes = np.array([(p.height, p.width) for p in self.photos])
        self._factors = np.ones(len(self.photos))
        self._offsets = np.array([p.offset for p in self.photos])
        self._chances: dict[int, np.ndarray] = {}

    def on(self, device: torch.device) -> PhotoCrops:
        """Return the same photos with crops on a device.

        The pixels are moved to the device if they fill less than a quarter of its free memory.
        Otherwise the same crops are cut on the CPU and uploaded, which is slower, and a line of
        output says so.
        """
        placed = copy.copy(self)
        placed.device = device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            if 4 * self._pixels.size < free:
                placed._upload()
            else:
                print(
                    f"the photos ({self._pixels.size} bytes) stay off {device} ({free} bytes free)"
                )
        return placed

    def _upload(self) -> None:
        self._uploaded = torch.from_numpy(np.array(self._pixels)).to(self.device).view(-1, 3)

    def with_captions(self) -> PhotoCrops:
        """Return only the photos that have captions. Raise ValueError if there are none."""
        chosen = copy.copy(self)
        chosen.photos = [photo for photo in self.photos if photo.captions]
        if not chosen.photos:
            raise ValueError("none of these photos has a caption")
        chosen._index()
        return chosen

    def weighing(self, sources: dict[str, float]) -> PhotoCrops:
        """Return the same photos with other chances of being drawn.

        Args:
            sources: factors on the chance, at least 0, by the prefix of the photos' keys.

        Raises:
            ValueError: a factor is below 0, no photo has a prefix, or no photo is left to draw.
        """
        chosen = copy.copy(self)
        chosen._index()
        for source, factor in sources.items():
            members = np.array([photo.key.startswith(source) for photo in self.photos])
            if not factor >= 0 or not members.any():
                raise ValueError(
                    f"sources must map prefixes of photos' keys to factors of at least 0, not "
                    f"{source!r} = {factor} ({members.sum()} photos)"
                )
            chosen._factors[members] *= factor
        if not chosen._factors.any():
            raise ValueError(f"sources leave no photo: {sources}")
        return chosen

    def pixels(self, photo: Photo) -> np.ndarray:
        """Return the photo's pixels, uint8 [H, W, 3], as a view of the memory map."""
        size = photo.height * photo.width * 3
        flat = self._pixels[photo.offset : photo.offset + size]
        return flat.reshape(photo.height, photo.width, 3)

    def batch(
        self, generator: np.random.Generator, count: int, side: int
    ) -> tuple[Tensor, list[str]]:
        """Draw ``count`` square crops.

        Returns:
            The images, float32 [count, 3, side, side] in [-1, 1] (channels last) on ``device``, and
            one caption per crop, which is "" if the photo has none.

        Raises:
            ValueError: no photo has at least ``side`` pixels on both sides.
        """
        if side not in self._chances:
            fits = self._sizes.min(1) >= side
            if not (fits * self._factors).any():
                raise ValueError(f"no photo is at least {side}x{side} pixels; use a smaller crop")
            chances = np.cumsum(np.sqrt(self._sizes.prod(1)) * fits * self._factors)
            self._chances[side] = chances / chances[-1]
        chosen = np.searchsorted(self._chances[side], generator.random(count), side="right")
        corners = generator.integers(self._sizes[chosen] - side + 1)
        mirrored = generator.random(count) < 0.5
        picks = generator.random(count)
        cut = self._cut_here if self._uploaded is None else self._cut_there
        crops = cut(chosen, corners, mirrored, side)
        captions = []
        for index, pick in zip(chosen.tolist(), picks.tolist(), strict=True):
            known = self.photos[index].captions
            captions.append(known[int(pick * len(known))] if known else "")
        return crops.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0), captions

    def _cut_here(
        self, chosen: np.ndarray, corners: np.ndarray, mirrored: np.ndarray, side: int
    ) -> Tensor:
        """Return crops, uint8 [B, side, side, 3], cut from the memory map on the CPU."""
        crops = np.empty((len(chosen), side, side, 3), np.uint8)
        for crop, index, (top, left), mirror in zip(
            crops, chosen, corners.tolist(), mirrored.tolist(), strict=True
        ):
            found = self.pixels(self.photos[index])[top : top + side, left : left + side]
            crop[:] = found[:, ::-1] if mirror else found
        return torch.from_numpy(crops).to(self.device)

    def _cut_there(
        self, chosen: np.ndarray, corners: np.ndarray, mirrored: np.ndarray, side: int
    ) -> Tensor:
        """Return the same crops as ``_cut_here``, cut from the pixels on the device."""
        assert self._uploaded is not None
        steps = self._sizes[chosen, 1]
        starts = self._offsets[chosen] // 3 + corners[:, 0] * steps + corners[:, 1]
        columns = np.where(mirrored[:, None], np.arange(side)[::-1], np.arange(side))
        start, step, column = (
            torch.from_numpy(values).to(self.device, non_blocking=True)
            for values in (starts, steps, columns)
        )
        rows = start[:, None] + step[:, None] * torch.arange(side, device=self.device)
        return self._uploaded[rows[:, :, None] + column[:, None, :]]


@dataclass(frozen=True)
class CropPlan:
    """The possible sides of crops, and the number of crops in a batch for each side.

    A step draws one side.

    Raises:
        ValueError: a side or a count is not positive, or there is not one count per side.
    """

    sides: tuple[int, ...] = (128, 192, 256)
    counts: tuple[int, ...] = (16, 8, 4)

    def __post_init__(self) -> None:
        if not self.sides or len(self.sides) != len(self.counts):
            raise ValueError(f"crops need one count per side, not {self.sides} and {self.counts}")
        if min(*self.sides, *self.counts) < 1:
            raise ValueError(f"crops need positive sides and counts, not {self}")

    def draw(self, data: PhotoCrops, generator: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Draw crops of one side. Return the images, [B, 3, S, S] in [-1, 1], and the captions."""
        pick = int(generator.integers(len(self.sides)))
        images, captions = data.batch(generator, self.counts[pick], self.sides[pick])
        return images.contiguous(memory_format=torch.channels_last), captions
