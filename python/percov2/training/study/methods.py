"""Methods of the study of entropy schedules that need training."""

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
from percov2.models.torch.backbone import TorchBackbone
from percov2.training.study import multiscale
from percov2.training.study.direct_stage import masked_model
from percov2.training.study.runs import SharedRun, fine_tuned

__all__ = ["fine_tuned_methods", "masked_methods", "multiscale_methods"]


_SAME_PHOTOS = 0.9
"""Smallest share of equal tokens if photos and maps match. bfloat16 changes a few tokens."""
_SLOWER = (
    "Re-reading and explicit VAR run in torch. They encode and decode with one pass per stage over "
    "all tokens known or coded so far. The others run compiled, encode with one pass, and decode "
    "with cached keys and values."
)


def fine_tuned_methods(
    shared: SharedRun, data: Path, maps: Sequence[TokenMap], steps: int, out: Path
) -> Iterator[Method]:
    """Yield a method for every order, with the shared weights fine-tuned for that order.

    The runs are in ``out``/ORDER.
    """

    def coder(name: str, order: Order) -> OrderCoder:
        return OrderCoder(TokenCoder(fine_tuned(shared, data, order, steps, out / name)), order)

    for method in order_methods("fine-tuned", coder, maps):
        yield method._replace(note=f"Fine-tuned: {steps} more steps on the row's order only.")


def masked_methods(
    shared: SharedRun, data: Path, maps: Sequence[TokenMap], out: Path
) -> Iterator[Method]:
    """Yield the paper's re-reading masked model in every order but raster.

    Raster would take a pass over all tokens for every token. The model's run is in ``out``.
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
    """Yield the explicit VAR method. Its training run and its codebooks are written to ``out``.

    Args:
        shared: the run whose sizes and settings are used.
        model: the model whose latents are coded.
        rate: name of the rate.
        photos: folder made by ``percov2 train data``, with the photos of ``maps``.
        maps: token maps of the held-out photos.
        out: folder of the training run.

    Raises:
        ValueError: ``photos`` does not match ``maps``, or all scales together have more than 8192
            codes.
    """
    if not isinstance(model, TorchBackbone):
        raise ValueError("explicit VAR needs a model on torch: open it with runtime='torch'")
    found = multiscale.photo_directions(model, rate, photos)
    size = model.config.rate(rate).codebook_size
    grids = [tokens.tokens.reshape(tokens.shape) for tokens in maps]
    equal = multiscale.same_tokens(model, rate, found, grids)
    if equal < _SAME_PHOTOS:
        share = f"{100 * equal:.1f} % of the held-out tokens are equal"
        raise ValueError(f"{photos} contains other photos than the token maps: {share}")
    quantizer = multiscale.ScaleQuantizer.stored(out / "codebooks.npy", found, size)
    scales = multiscale.ScaleMaps(quantizer, found)
    single, several = multiscale.mean_cosines(model, rate, quantizer, found)
    transformer = multiscale.multiscale_model(shared, scales, out)
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
        f"Explicit VAR has its own tokens: a codebook of {size} per scale, by k-means on the "
        "residual of the coarser scales. Its mean cosine with the hyper-latents' directions is "
        f"{several:.4f}, that of the single grid {single:.4f}. {_SLOWER}",
    )
