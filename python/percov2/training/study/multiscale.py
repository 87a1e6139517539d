"""Explicit hierarchical VAR on frozen hyper-latents: codebooks, tokens and training.

A rate's quantizer replaces each direction by one code. Here a direction is the sum of several
codes, from coarse to fine. K-means fits each scale's codebook to the residual of the coarser
scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from percov2.entropy.torch.direct import DirectBatch
from percov2.entropy.torch.int_transformer import IntTransformer
from percov2.entropy.torch.scales import scale_plan, scale_shapes
from percov2.entropy.visibility import sixteenth, size_class
from percov2.models.torch.backbone import TorchBackbone
from percov2.photos import PhotoCrops, is_held_out
from percov2.training.shards import image_batch
from percov2.training.stage2 import evenly_spread
from percov2.training.study.direct_stage import DirectExamples, DirectStage
from percov2.training.study.runs import SharedRun, digest, finished

__all__ = ["PhotoDirections", "ScaleMaps", "ScaleQuantizer", "k_means", "mean_cosines"]
__all__ += ["multiscale_model", "photo_directions", "same_tokens"]

_FIT_VECTORS = 200_000
"""Approximate number of tokens for fitting codebooks. K-means sees half of these vectors."""
_ROUNDS = 25
Shape = tuple[int, int]


@dataclass(frozen=True)
class PhotoDirections:
    """The directions, float32 [h, w, D], and the held-out flags of photos cut to whole tokens."""

    directions: list[Tensor]
    held_out: list[bool]

    def part(self, held_out: bool) -> list[Tensor]:
        """Return the directions of the held-out photos if ``held_out``, else of the others."""
        pairs = zip(self.directions, self.held_out, strict=True)
        return [grid for grid, held in pairs if held == held_out]


def photo_directions(model: TorchBackbone, rate: str, cache: Path) -> PhotoDirections:
    """Return the directions that ``percov2 train tokens`` quantizes in each photo's first view.

    ``cache`` is a folder made by ``percov2 train data``.

    Raises:
        ValueError: the rate is unknown, or there are no photos.
    """
    side = model.config.rate(rate).token_side
    photos = PhotoCrops(cache, "all")
    large = [photo for photo in photos.photos if min(photo.height, photo.width) >= side]
    directions = []
    for photo in tqdm(large, desc="directions", unit="photo"):
        height, width = photo.height // side * side, photo.width // side * side
        image = image_batch(photos.pixels(photo)[:height, :width])
        directions.append(model.directions(image, rate)[0].cpu().clone())
    return PhotoDirections(directions, [is_held_out(photo.key) for photo in large])


def k_means(vectors: Tensor, size: int, seed: int) -> Tensor:
    """Return the k-means of vectors, float32 [n, D], as float32 [size, D].

    n must be at least ``size``.
    """
    if len(vectors) < size:
        raise ValueError(f"{len(vectors)} vectors for {size} codes; give more photos")
    generator = torch.Generator().manual_seed(seed)
    means = vectors[torch.randperm(len(vectors), generator=generator)[:size]].clone()
    for _ in range(_ROUNDS):
        nearest = nearest_codes(vectors, means)
        counts = torch.bincount(nearest, minlength=size)
        sums = torch.zeros_like(means).index_add_(0, nearest, vectors)
        means = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        again = torch.randint(len(vectors), (len(empty),), generator=generator)
        means[empty] = vectors[again]
    return means


def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return the indices, int64 [n], of the codes [V, D] nearest to the vectors [n, D]."""
    half = codes.square().sum(1) / 2
    parts = [(part @ codes.T - half).argmax(1) for part in vectors.split(2**14)]
    return torch.cat(parts)


def _shrunk(grid: Tensor, shape: Shape) -> Tensor:
    """Return the means of ``grid`` [h, w, D] in a coarser grid's cells, [n, D] in raster order."""
    small = functional.interpolate(grid.permute(2, 0, 1)[None], shape, mode="area")
    return small[0].flatten(1).T


def _grown(codes: Tensor, shape: Shape, whole: Sequence[int]) -> Tensor:
    """Interpolate codes [n, D] of a grid of ``shape`` to [h, w, D]."""
    grid = codes.T.view(1, -1, *shape)
    return functional.interpolate(grid, list(whole), mode="bilinear")[0].permute(1, 2, 0)


class ScaleQuantizer:
    """A residual quantizer over scales, with codebooks float32 [S, V, D], the coarsest first."""

    def __init__(self, codebooks: Tensor) -> None:
        self.codebooks = codebooks

    @classmethod
    def stored(cls, path: Path, photos: PhotoDirections, codebook_size: int) -> ScaleQuantizer:
        """Load the codebooks from the .npy file ``path``. If it is missing, fit and save them."""
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, cls.fit(photos.part(False), codebook_size).codebooks.numpy())
        return cls(torch.from_numpy(np.load(path, allow_pickle=False)))

    @classmethod
    def fit(cls, directions: list[Tensor], codebook_size: int, seed: int = 0) -> ScaleQuantizer:
        """Fit codebooks to directions [h, w, D]. Raise ValueError if a scale lacks vectors."""
        order = np.random.default_rng(seed).permutation(len(directions))
        sizes = np.cumsum([directions[i].shape[0] * directions[i].shape[1] for i in order])
        chosen = order[: int(np.searchsorted(sizes, _FIT_VECTORS)) + 1]
        left = [directions[i] for i in chosen]
        shapes = [scale_shapes(*grid.shape[:2]) for grid in left]
        books: list[Tensor] = []
        for scale in tqdm(range(max(map(len, shapes))), desc="codebooks", unit="scale"):
            having = [i for i, s in enumerate(shapes) if len(s) > scale]
            small = {i: _shrunk(left[i], shapes[i][scale]) for i in having}
            vectors = torch.cat(list(small.values()))
            step = 1 + len(vectors) // (_FIT_VECTORS // 2)
            books.append(k_means(vectors[::step], codebook_size, seed))
            for i in having:
                codes = books[-1][nearest_codes(small[i], books[-1])]
                left[i] = left[i] - _grown(codes, shapes[i][scale], left[i].shape[:2])
        return cls(torch.stack(books))

    def tokens(self, directions: Tensor) -> NDArray[np.int32]:
        """Return the tokens, int32 [E], of directions [h, w, D] in the order of ``scale_plan``.

        Raises:
            ValueError: the grid has more scales than there are codebooks.
        """
        height, width = directions.shape[:2]
        shapes = scale_shapes(height, width)
        if len(shapes) > len(self.codebooks):
            found = f"a grid of {height}x{width} has {len(shapes)} scales"
            raise ValueError(f"{found}; the training photos had {len(self.codebooks)}")
        parts = []
        for shape, book in zip(shapes, self.codebooks, strict=False):
            parts.append(nearest_codes(_shrunk(directions, shape), book))
            directions = directions - _grown(book[parts[-1]], shape, (height, width))
        return torch.cat(parts).numpy().astype(np.int32)

    def restored(self, tokens: NDArray[np.int32], shape: Shape) -> Tensor:
        """Return the unit vectors, float32 [h, w, D], of tokens int32 [E]."""
        total = torch.zeros(*shape, self.codebooks.shape[2])
        begin = 0
        for small, book in zip(scale_shapes(*shape), self.codebooks, strict=False):
            part = torch.from_numpy(tokens[begin : begin + small[0] * small[1]]).long()
            total += _grown(book[part], small, shape)
            begin += len(part)
        return functional.normalize(total, dim=-1)


class ScaleMaps:
    """The tokens of all scales of photos.

    Attributes:
        maps: tokens of the training photos, int32 [n, E], by the shape of their finest grid.
        held_out: shapes and tokens, int32 [E], of the held-out photos that ``TokenMaps`` has.
        codebook_size: size of each scale's codebook.
        scales: largest number of scales of a photo.
    """

    def __init__(self, quantizer: ScaleQuantizer, photos: PhotoDirections) -> None:
        self.scales, self.codebook_size = quantizer.codebooks.shape[:2]
        by_shape = defaultdict(list)
        self.held_out: list[tuple[Shape, NDArray[np.int32]]] = []
        pairs = zip(photos.directions, photos.held_out, strict=True)
        for grid, held in tqdm(list(pairs), desc="scales", unit="photo"):
            shape, tokens = (grid.shape[0], grid.shape[1]), quantizer.tokens(grid)
            if held:
                self.held_out.append((shape, tokens))
            else:
                by_shape[shape].append(tokens)
        self.held_out = evenly_spread(self.held_out)
        self.maps = {shape: np.stack(tokens) for shape, tokens in by_shape.items()}

    def counts(self) -> NDArray[np.int64]:
        """Return the number of times that each token of each scale occurs, int64 [S * V]."""
        counts = np.zeros(self.scales * self.codebook_size, dtype=np.int64)
        for shape, tokens in self.maps.items():
            every = tokens + scale_plan(*shape, self.codebook_size).first
            counts += np.bincount(every.reshape(-1), minlength=len(counts))
        return counts

    def size_classes(self) -> tuple[set[int], set[int]]:
        """Return the size classes of the training maps' heights and widths."""
        return {size_class(h) for h, _ in self.maps}, {size_class(w) for _, w in self.maps}

    def draw(self, generator: np.random.Generator, tokens_per_step: int) -> DirectExamples:
        """Draw whole maps of one shape, with about equal chances for all tokens."""
        shapes = list(self.maps)
        sizes = np.array([self.maps[shape].size for shape in shapes], dtype=np.float64)
        shape = shapes[int(generator.choice(len(shapes), p=sizes / sizes.sum()))]
        plan = scale_plan(*shape, self.codebook_size)
        count = max(1, round(tokens_per_step / len(plan.stage)))
        tokens = self.maps[shape][generator.integers(len(self.maps[shape]), size=count)]
        rows = sixteenth(plan.entries.row.astype(np.int64), shape[0])
        columns = sixteenth(plan.entries.column.astype(np.int64), shape[1])
        classes = torch.tensor([[size_class(side) for side in shape]])
        places = (torch.from_numpy(rows), torch.from_numpy(columns), classes)
        payload = torch.from_numpy(plan.payload(tokens))
        batch = DirectBatch(plan.entries, payload, *(part.expand(count, -1) for part in places))
        weights = torch.full(tokens.shape, 1 / tokens.size)
        return DirectExamples(batch, torch.from_numpy(tokens + plan.first), weights)


def multiscale_model(shared: SharedRun, maps: ScaleMaps, out: Path) -> IntTransformer:
    """Train the model of all scales' tokens with the shared model's sizes and settings.

    Its embedding and head have one codebook per scale. The other arguments, the result and the
    errors are those of ``direct_stage.masked_model``.
    """
    per_step = shared.config.tokens_per_step
    torch.manual_seed(shared.loop.seed)
    stage = DirectStage(shared.config, maps.counts(), lambda draw: maps.draw(draw, per_step))
    facts = {"data": digest([*maps.maps.values(), *(tokens for _, tokens in maps.held_out)])}
    model = finished(stage, maps.size_classes(), shared.loop, out, facts)
    return IntTransformer(model.config, model.tensors)


def same_tokens(
    model: TorchBackbone, rate: str, photos: PhotoDirections, maps: Sequence[NDArray[np.int32]]
) -> float:
    """Return the share of tokens that are equal in ``maps`` and in the held-out photos.

    The share is 0 if shapes differ. It is below 1 for maps made in bfloat16.

    Args:
        maps: token maps int32 [h, w], from ``TokenMaps.held_out``.
    """
    single = model.quantizer(rate)
    held = evenly_spread(photos.part(True))
    found = [single.nearest(grid.to(model.device)).cpu().numpy() for grid in held]
    if [grid.shape for grid in found] != [tokens.shape for tokens in maps]:
        return 0.0
    equal = sum(int((a == b).sum()) for a, b in zip(found, maps, strict=True))
    return equal / sum(tokens.size for tokens in maps)


def mean_cosines(
    model: TorchBackbone, rate: str, quantizer: ScaleQuantizer, photos: PhotoDirections
) -> tuple[float, float]:
    """Return the mean cosines between the directions of held-out photos and their codes.

    Returns:
        The mean for the rate's single grid of codes, and the mean for the codes of all scales.
    """
    single = model.quantizer(rate)
    sums, count = torch.zeros(2), 0
    for grid in evenly_spread(photos.part(True)):
        codes = single.codebook[single.nearest(grid.to(model.device)).long()].float().cpu()
        height, width = grid.shape[:2]
        restored = quantizer.restored(quantizer.tokens(grid), (height, width))
        sums += torch.stack([(grid * codes).sum(), (grid * restored).sum()])
        count += height * width
    return float(sums[0]) / count, float(sums[1]) / count
