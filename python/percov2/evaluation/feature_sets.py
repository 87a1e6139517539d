"""Features of pictures and of their patches, stored per picture, so that shards can be merged.

A network turns pictures into features (``FeatureNetwork``). ``collect`` applies it to whole
pictures or to patches. A ``FeatureSet`` keeps one row of features per picture or patch in float32.
Merged shards hold the same rows in the same order as one run, so every distance is the same too.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.files import read_arrays, write_bytes

__all__ = ["PATCHES", "PATCH_SIDE", "FeatureNetwork", "FeatureSet", "collect", "patches"]

PATCH_SIDE = 256
"""Side of a patch in FID/256 and KID/256, in pixels."""

PATCHES = (
    "non-overlapping patches from the top left, and the same grid shifted by half a patch in both "
    "directions if both sides have 1.5 patches or more (FID/256 of HiFiC, Mentzer et al. 2020, as "
    "update_patch_fid of NeuralCompression, the code of MS-ILLM, cuts them)"
)
"""Definition of the patches, for reports."""

Pixels = NDArray[np.uint8]


def patches(pixels: Pixels, side: int = PATCH_SIDE) -> list[Pixels]:
    """Return the patches, views of [side, side, 3], of a picture [H, W, 3].

    They are those of FID/256 in HiFiC (Mentzer et al. 2020, arXiv 2006.09965) as the code of
    MS-ILLM cuts them (NeuralCompression, ``update_patch_fid``). The first grid begins at the top
    left. The second grid begins at (side // 2, side // 2), so it has patches if both sides of the
    picture have 1.5 patches or more. In both grids, a rest at the right or at the bottom belongs to
    no patch. A picture with a shorter side than a patch has no patches.

    >>> [len(patches(np.zeros((*size, 3), np.uint8))) for size in [(255, 512), (256, 512)]]
    [0, 2]
    >>> len(patches(np.zeros((512, 768, 3), np.uint8)))  # 2x3, and 1x2 in the second grid
    8
    """
    height, width = pixels.shape[:2]
    return [
        pixels[top : top + side, left : left + side]
        for start in (0, side // 2)
        for top in range(start, height - side + 1, side)
        for left in range(start, width - side + 1, side)
    ]


class FeatureNetwork(ABC):
    """A network that maps pictures to features in batches.

    Every call of the network has exactly ``batch_size`` pictures: copies of the last picture fill
    the last batch. The shape of a batch can change the last bits of a result. With one shape for
    all batches, the size of a shard does not change the features.

    Args:
        device: device of the network, as torch names it.
        batch_size: number of pictures per call of the network.
        threads: number of threads that resize pictures.

    Attributes:
        title: name and identity of the network, for reports and for ``FeatureSet``.
    """

    title: str

    def __init__(self, device: str = "cpu", batch_size: int = 32, threads: int = 4) -> None:
        if batch_size < 1 or threads < 1:
            raise ValueError("batch_size and threads must be at least 1")
        self.device, self.batch_size, self._threads = device, batch_size, threads

    @abstractmethod
    def _prepared(self, picture: Pixels) -> Tensor:
        """Return the network's input, float32 [3, S, S], for a picture, uint8 [H, W, 3]."""

    @abstractmethod
    def _seen(self, batch: Tensor) -> Tensor:
        """Return the features [B, D] of inputs [B, 3, S, S] on the device."""

    @torch.inference_mode()
    def features(self, pictures: Pixels | Sequence[Pixels]) -> NDArray[np.float32]:
        """Return the features, float32 [N, D], of pictures, uint8 [N, H, W, 3].

        A sequence of pictures [H, W, 3] may hold different sizes. Raises ValueError for other
        pictures, and for none.
        """
        if not len(pictures):
            raise ValueError("features need at least one picture")
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    f"pictures are uint8 [H, W, 3], not {picture.dtype} {picture.shape}"
                )
        found = []
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(pictures), self.batch_size):
                part = pictures[start : start + self.batch_size]
                inputs = list(pool.map(self._prepared, part))
                inputs += inputs[-1:] * (self.batch_size - len(inputs))
                seen = self._seen(torch.stack(inputs).to(self.device))
                found.append(seen[: len(part)].float().cpu())
        return torch.cat(found).numpy()


@dataclass(frozen=True)
class FeatureSet:
    """Features of pictures or patches in the order of the pictures' keys.

    Attributes:
        network: title of the network.
        side: side of the patches in pixels, or 0 for whole pictures.
        keys: the pictures' keys, ascending.
        counts: number of rows of each picture. It is 0 for a picture without patches.
        rows: the features, float32 [sum of counts, D], picture by picture.
    """

    network: str
    side: int
    keys: tuple[str, ...]
    counts: NDArray[np.int64]
    rows: NDArray[np.float32]

    @property
    def photo(self) -> NDArray[np.int64]:
        """Return the number of each row's picture among the pictures that have rows.

        ``KernelSums`` and ``PhotoBootstrap`` take it.
        """
        counts = self.counts[self.counts > 0]
        return np.repeat(np.arange(len(counts)), counts)

    @classmethod
    def merged(cls, shards: Sequence[FeatureSet]) -> FeatureSet:
        """Return the set of all shards' pictures, the same as one run over them.

        Raises ValueError for no shards, for shards of different networks or patches, and for a
        picture that is in two shards.
        """
        if not shards:
            raise ValueError("there are no shards to merge")
        kinds = {(shard.network, shard.side, shard.rows.shape[1]) for shard in shards}
        if len(kinds) > 1:
            raise ValueError(f"shards of different kinds cannot be merged: {sorted(kinds)}")
        keys = [key for shard in shards for key in shard.keys]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        for one, two in pairwise(order):
            if keys[one] == keys[two]:
                raise ValueError(f"{keys[one]} is in the shards twice")
        counts = np.concatenate([shard.counts for shard in shards])
        rows = np.concatenate([shard.rows for shard in shards])
        parts = np.split(rows, counts.cumsum()[:-1])
        together = np.concatenate([rows[:0], *(parts[i] for i in order)])
        first = shards[0]
        return cls(
            first.network, first.side, tuple(keys[i] for i in order), counts[order], together
        )

    def save(self, path: Path) -> None:
        """Write the set to an .npz file."""
        stream = io.BytesIO()
        np.savez(
            stream,
            network=np.str_(self.network),
            side=self.side,
            keys=np.array(self.keys, dtype=np.str_),
            counts=self.counts,
            rows=self.rows,
        )
        write_bytes(path, stream.getvalue())

    @classmethod
    def load(cls, path: Path) -> FeatureSet:
        """Return the set in a file of ``save``. Raise ValueError if it is damaged or another."""
        stored = read_arrays(path)
        if set(stored) != {"network", "side", "keys", "counts", "rows"} or (
            len(stored["keys"]) != len(stored["counts"])
            or stored["counts"].sum() != len(stored["rows"])
        ):
            raise ValueError(f"{path} holds no set of features")
        return cls(
            str(stored["network"]),
            int(stored["side"]),
            tuple(stored["keys"].tolist()),
            stored["counts"],
            stored["rows"],
        )


def collect(
    network: FeatureNetwork, pictures: Iterable[tuple[str, Pixels]], side: int = 0
) -> FeatureSet:
    """Return the features of pictures, given as keys and uint8 [H, W, 3].

    Batches reach across pictures. ``side`` is the side of the patches (``patches``), or 0 for whole
    pictures. Raises ValueError for two pictures of one key, and if there is nothing to see.
    """
    keys, counts, found = [], [], []
    waiting: list[Pixels] = []
    for key, pixels in pictures:
        cut = patches(pixels, side) if side else [pixels]
        keys.append(key)
        counts.append(len(cut))
        waiting += cut
        ready = len(waiting) // network.batch_size * network.batch_size
        if ready:
            found.append(network.features(waiting[:ready]))
            waiting = [part.copy() for part in waiting[ready:]]  # views keep their pictures alive
    if waiting:
        found.append(network.features(waiting))
    if not found:
        raise ValueError(f"{len(keys)} pictures hold nothing to see at patches of {side} pixels")
    rows = np.concatenate(found)
    return FeatureSet.merged(
        [FeatureSet(network.title, side, tuple(keys), np.array(counts, np.int64), rows)]
    )


def file_digest(path: Path) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
