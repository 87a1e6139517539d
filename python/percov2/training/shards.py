"""Crops from WebDataset shards, read without a cache. Processes share them, and runs can resume.

Every position in a batch has its own stream. An endless stream visits its shards, and the samples
of each shard, in random order. Therefore a batch depends on the seed and on earlier draws, but not
on the number of processes. Three numbers store the position of a stream.

Shards are plain ``.tar`` files with ``<key>.webp|jpg|jpeg|png`` and, optionally, ``<key>.txt`` (one
caption per line). The reader seeks in them, so they cannot be pipes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from percov2.datasets.shards import DAMAGE, MOST_BYTES, members_of, open_shard, reason_of
from percov2.images import check_size, decode_image, open_lazily, to_rgb
from percov2.photos import (
    PHOTO_ENDINGS,
    PhotoWarning,
    captions_ending,
    is_held_out,
    lines_of,
    photo_ending,
    photos_of,
    tell_left_out,
)
from percov2.stored_files import one_line

__all__ = ["CropFeed", "Member", "Position", "Sample", "ShardStreams"]
__all__ += ["image_batch", "read_member", "shard_members", "shard_photos"]

_THREADS = 4


@dataclass(frozen=True)
class Member:
    """A sample of a shard: the byte ranges (offset, length) of its photo and of its captions."""

    key: str
    photo: tuple[int, int]
    captions: tuple[int, int] | None


@lru_cache(maxsize=256)
def shard_members(shard: Path) -> tuple[Member, ...]:
    """Return the samples of a shard. Raise ValueError if it is not a tar file with photos."""
    found: dict[str, Member] = {}
    others: list[str] = []
    try:
        with open_shard(shard, compressed=False) as tar:
            for key, members in members_of(tar):
                named = dict(members)
                photo, text = photo_ending(named), captions_ending(named)
                if photo is None:
                    others += [member.name for member in named.values()]
                    continue
                parts = [named[ending] for ending in (photo, text) if ending is not None]
                if large := [part for part in parts if part.size > MOST_BYTES]:
                    message = f"skipped {key}: {large[0].name} has {large[0].size} bytes"
                    warnings.warn(f"{shard.name}: {message}", PhotoWarning, stacklevel=2)
                    continue
                places = [(part.offset_data, part.size) for part in parts]
                found[key] = Member(key, places[0], places[1] if text else None)
    except DAMAGE as error:
        reason = reason_of(shard, error)
        raise ValueError(
            f"{shard} is no uncompressed tar file, or is damaged: {reason}; compressed shards must "
            "be unpacked"
        ) from error
    tell_left_out(shard, others)
    if not found:
        raise ValueError(f"{shard.name} contains no photo ({', '.join(PHOTO_ENDINGS)})")
    return tuple(found.values())


def read_member(shard: Path, member: Member) -> tuple[bytes, tuple[str, ...]]:
    """Return the file of a sample's photo, and its captions."""
    with open(shard, "rb") as file:
        file.seek(member.photo[0])
        photo, text = file.read(member.photo[1]), b""
        if member.captions is not None:
            file.seek(member.captions[0])
            text = file.read(member.captions[1])
    return photo, lines_of(text)


def shard_photos(shard: Path, side: int, longest: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the key and the pixels of each photo of a shard.

    The pixels are uint8 [H, W, 3], and H and W are multiples of ``side``. If a photo's shorter side
    exceeds ``longest``, the photo is scaled down until its shorter side is ``longest``. Photos with
    a shorter side below ``side`` are left out. Errors and warnings are those of ``photos_of``.
    """
    for key, photo, _ in photos_of(shard):
        picture = Image.fromarray(photo)
        scale = min(1.0, longest / min(picture.size))
        width, height = (round(length * scale) for length in picture.size)
        if min(width, height) >= side:
            pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
            yield key, pixels[: height - height % side, : width - width % side]


def image_batch(pixels: NDArray[np.uint8]) -> Tensor:
    """Return pixels [H, W, 3] as a batch of one image, float32 [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1.0)


@dataclass(frozen=True)
class Sample:
    """A training sample."""

    pixels: NDArray[np.uint8]  # [S, S, 3]
    caption: str  # one of the photo's captions, "" if it has none
    randomness: np.random.Generator  # for further draws, the same for any number of processes


@dataclass(frozen=True)
class Position:
    """The position of a stream.

    It counts the rounds done, the shards done in this round, and the samples done in this shard.
    """

    rounds: int = 0
    shards: int = 0
    samples: int = 0


class ShardStreams:
    """Endless streams of square crops of photos that are not held out (``is_held_out``).

    Args:
        shards: all shards in a fixed order. Stream i reads shards i, i + streams, … If there are
            fewer shards than streams, n streams share a shard, and each takes every n-th sample.
        streams: number of streams.
        side: side of the crops in pixels. Photos with a shorter side are skipped.
        longest: largest shorter side of a scaled photo in pixels. The shorter side is drawn from
            ``side`` to ``longest``, but photos are never scaled up.
        seed: seed of all orders, crops and captions.

    Raises:
        ValueError: there is no shard, or ``longest`` is below ``side``.
    """

    def __init__(
        self, shards: list[Path], streams: int, side: int, longest: int, seed: int
    ) -> None:
        if not shards:
            raise ValueError("no .tar shards; give a folder of WebDataset shards")
        if longest < side:
            raise ValueError(f"longest must be at least the crops' side of {side}, not {longest}")
        self.shards, self.streams, self.seed = shards, streams, seed
        self.side, self.longest = side, longest

    def next(self, stream: int, position: Position) -> tuple[Sample, Position]:
        """Return a stream's first usable sample from a position on, and the next position.

        Photos that are too small or damaged are skipped. Damaged photos also cause a warning.

        Raises:
            ValueError: a whole round over the stream's shards contains no usable photo.
        """
        first_round = position.rounds
        while position.rounds <= first_round + 1:
            shard, members, more = self._shard(stream, position)
            if position.samples >= len(members):
                done = (position.rounds, position.shards + 1) if more else (position.rounds + 1, 0)
                position = Position(*done)
                continue
            random = self._random(0, stream, *vars(position).values())
            sample = self._crop(shard, members[position.samples], random)
            position = replace(position, samples=position.samples + 1)
            if sample is not None:
                return sample, position
        small = f"has at least {self.side} pixels on both sides; use a smaller crop or other shards"
        raise ValueError(f"no photo in the shards of stream {stream} {small}")

    def _shard(self, stream: int, position: Position) -> tuple[Path, list[Member], bool]:
        """Return the shard at a position, the stream's samples in it, and whether more follow.

        Streams that share a shard divide one order of its samples.
        """
        count = len(self.shards)
        if count < self.streams:
            shard = self.shards[stream % count]
            sharing = range(stream % count, self.streams, count)
            share, shares, more = sharing.index(stream), len(sharing), False
            random = self._random(1, stream % count, position.rounds)
        else:
            own = self.shards[stream :: self.streams]
            order = self._random(2, stream, position.rounds).permutation(len(own))
            shard, share, shares = own[order[position.shards]], 0, 1
            more = position.shards + 1 < len(own)
            random = self._random(1, stream, position.rounds, position.shards)
        members = shard_members(shard)
        chosen = [members[i] for i in random.permutation(len(members))[share::shares]]
        return shard, [member for member in chosen if not is_held_out(member.key)], more

    def _random(self, *names: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *names])

    def _crop(self, shard: Path, member: Member, random: np.random.Generator) -> Sample | None:
        try:
            data, captions = read_member(shard, member)
            photo = open_lazily(io.BytesIO(data))
            if min(photo.size) < self.side:
                return None
            check_size(*photo.size)
            if photo.format not in ("JPEG", "MPO"):
                photo = decode_image(io.BytesIO(data))
            shorter = int(random.integers(self.side, min(self.longest, min(photo.size)) + 1))
            # JPEG decodes several times faster to a half, a quarter or an eighth of its size.
            photo.draft("RGB", (shorter, shorter))
            picture = Image.fromarray(to_rgb(photo))
            scale = shorter / min(picture.size)
            width, height = (max(self.side, round(length * scale)) for length in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            message = f"{shard.name}: skipped {member.key}: {one_line(error)}"
            warnings.warn(message, PhotoWarning, stacklevel=2)
            return None
        left = int(random.integers(width - self.side + 1))
        top = int(random.integers(height - self.side + 1))
        pixels = np.asarray(picture)[top : top + self.side, left : left + self.side]
        if random.integers(2):
            pixels = pixels[:, ::-1]
        caption = str(random.choice(captions)) if captions else ""
        return Sample(pixels, caption, random)


class CropFeed:
    """A process's part of the batches of a run. Threads read samples ahead.

    The batch of all processes has one stream per position, and a step has ``parts`` forward passes.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """

    def __init__(
        self, streams: ShardStreams, process: int = 0, processes: int = 1, parts: int = 1
    ) -> None:
        if streams.streams % (processes * parts):
            raise ValueError(
                f"a batch of {streams.streams} cannot be divided among {processes} processes and "
                f"{parts} forward passes; change batch or accumulate"
            )
        self.streams = streams
        places = range(process, streams.streams, processes)
        size = len(places) // parts
        self._parts = [places[i : i + size] for i in range(0, len(places), size)]
        self._part = 0
        self._positions = {place: Position() for place in places}
        self._threads = ThreadPoolExecutor(min(size, _THREADS))
        self._ahead: list[Future[tuple[Sample, Position]]] = []

    def take(self) -> list[Sample]:
        """Return this process's samples for the next forward pass, in order."""
        found = [future.result() for future in self._ahead or self._begin()]
        places = self._parts[self._part]
        self._positions.update(zip(places, (after for _, after in found), strict=True))
        self._part = (self._part + 1) % len(self._parts)
        self._ahead = self._begin()
        return [sample for sample, _ in found]

    def _begin(self) -> list[Future[tuple[Sample, Position]]]:
        return [
            self._threads.submit(self.streams.next, place, self._positions[place])
            for place in self._parts[self._part]
        ]

    def positions(self) -> dict[int, list[int]]:
        """Return the positions of this process's streams. Samples read ahead do not count."""
        return {place: list(vars(at).values()) for place, at in self._positions.items()}

    def go_to(self, positions: dict[int, list[int]]) -> None:
        """Continue from the positions of all streams.

        Raises ValueError if the number of streams differs.
        """
        if len(positions) != self.streams.streams:
            found = f"{len(positions)} samples, not {self.streams.streams}"
            raise ValueError(f"the run's batches had {found}; resume it with the same batch")
        self._positions = {place: Position(*positions[place]) for place in self._positions}
        self._ahead = []
