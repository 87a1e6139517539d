"""Rows of the study of entropy schedules that have to be trained before they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.torch.direct import masked_plan
from percov2.entropy.torch.scales import scale_plan, scale_shapes
from percov2.evaluation.study.coders import DirectCoder, OrderCoder, TokenMap
from percov2.evaluation.study.comparison import Method, order_methods
from percov2.evaluation.study.schedules import Order
from percov2.models.backbone import Backbone
from percov2.training.study.direct_stage import masked_model
from percov2.training.study.multiscale import (
    ScaleMaps,
    ScaleQuantizer,
    mean_cosines,
    multiscale_model,
    photo_directions,
    same_tokens,
)
from percov2.training.study.runs import SharedRun, fine_tuned

_SAME_PHOTOS = 0.9
"""Share of equal tokens from which photos are those of the maps: bfloat16 changes a few."""
_SLOWER = (
    "Re-reading and explicit VAR run in torch, one pass over all tokens so far known or asked for "
    "per stage, to decode and to encode; the others run compiled, with one pass to encode and "
    "cached keys and values to decode."
)


def fine_tuned_methods(
    shared: SharedRun, data: Path, maps: Sequence[TokenMap], steps: int, out: Path
) -> Iterator[Method]:
    """Every order with the shared weights trained on for it alone; runs in ``out``/ORDER."""

    def coder(name: str, order: Order) -> OrderCoder:
        return OrderCoder(TokenCoder(fine_tuned(shared, data, order, steps, out / name)), order)

    for method in order_methods("fine-tuned", coder, maps):
        yield method._replace(note=f"Fine-tuned: {steps} more steps on the row's order alone.")


def masked_methods(
    shared: SharedRun, data: Path, maps: Sequence[TokenMap], out: Path
) -> Iterator[Method]:
    """The paper's re-reading masked model in every order but the raster; its run in ``out``.

    A raster would take a pass over all tokens for every token.
    """
    model = masked_model(shared, data, out)

    def coder(name: str, order: Order) -> DirectCoder:
        size = model.config.codebook_size
        return DirectCoder(model, lambda h, w: masked_plan(order(h, w)), size)

    for method in order_methods("re-reading", coder, maps):
        if method.name != "raster":
            yield method._replace(note=_SLOWER)


def multiscale_methods(
    shared: SharedRun,
    model: Backbone,
    rate: str,
    photos: Path,
    maps: Sequence[TokenMap],
    out: Path,
) -> Iterator[Method]:
    """Explicit VAR: codebooks and tokens of all scales; its run and codebooks in ``out``.

    Args:
        photos: out of ``percov2 train data``: those that ``maps`` are of.

    Raises:
        ValueError: other photos, or a rate of too many scales and codes for one transformer.
    """
    found = photo_directions(model, rate, photos)
    size = model.config.rate(rate).codebook_size
    grids = [tokens.tokens.reshape(tokens.shape) for tokens in maps]
    equal = same_tokens(model, rate, found, grids)
    if equal < _SAME_PHOTOS:
        raise ValueError(
            f"{photos} holds other photos than those of the token maps: {100 * equal:.1f} % of the "
            "held-out tokens are equal"
        )
    quantizer = ScaleQuantizer.stored(out / "codebooks.npy", found, size)
    scales = ScaleMaps(quantizer, found)
    single, several = mean_cosines(model, rate, quantizer, found)
    transformer = multiscale_model(shared, scales, out)
    coder = DirectCoder(transformer, lambda h, w: scale_plan(h, w, size), size)

    def panels(height: int, width: int) -> list[NDArray[np.int64]]:
        return [np.full(shape, 2) for shape in scale_shapes(height, width)]

    yield Method(
        "explicit_var",
        "explicit VAR, sides 1, 2, 4, …",
        "own",
        coder,
        [TokenMap(shape, tokens) for shape, tokens in scales.held_out],
        panels,
        f"Explicit VAR has other tokens: a codebook of {size} per scale, by k-means on what "
        "coarser scales leave over. Mean cosine with the hyper-latents' directions: "
        f"{several:.4f}; the single grid's: {single:.4f}. {_SLOWER}",
    )
