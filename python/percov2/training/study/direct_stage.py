"""Training of transformers whose entries are also outputs, such as the re-reading masked model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from percov2.entropy.torch.direct import UNKNOWN, DirectBatch, direct_logits, masked_plan
from percov2.entropy.torch.int_transformer import IntTransformer
from percov2.entropy.torch.transformer import TokenBatch
from percov2.training.stage import Figures
from percov2.training.stage2 import EntropyConfig, RoundedStage, TokenMaps
from percov2.training.study.runs import SharedRun, digest, finished

__all__ = ["DirectExamples", "DirectStage", "DrawExamples", "masked_examples", "masked_model"]


class DirectExamples(NamedTuple):
    """A batch of entries with targets and weights.

    Attributes:
        batch: the entries that the transformer reads.
        targets: tokens of the entries, int64 [B, E].
        weights: weights in the loss, float32 [B, E]. They sum to 1 and are 0 for known tokens.
    """

    batch: DirectBatch
    targets: Tensor  # tokens of the entries, int64 [B, E]
    weights: Tensor  # weights in the loss, float32 [B, E]; 0 for known tokens, with a sum of 1


Counts = NDArray[np.int64]
DrawExamples = Callable[[np.random.Generator], DirectExamples]


class DirectStage(RoundedStage):
    """The stage that trains a transformer on the bits per token of entries.

    Args:
        config: sizes of the transformer, and the times at which rounding starts and scales are
            fixed.
        counts: number of times that each token occurs, int64 [V]. V is the codebook size.
        draw: a function that draws a batch.
    """

    def __init__(self, config: EntropyConfig, counts: Counts, draw: DrawExamples) -> None:
        super().__init__(config, counts)
        self.draw_examples = draw

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, Figures]:
        batch, targets, weights = self.draw_examples(generator)
        with self.precision():
            logits = direct_logits(self.transformer, batch)
        targets, weights = (part.flatten().to(logits.device) for part in (targets, weights))
        nats = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        loss = (nats * weights).sum() / math.log(2.0)
        return loss, {"bits": loss.detach()}


def masked_examples(generator: np.random.Generator, crops: TokenBatch) -> DirectExamples:
    """Hide a uniformly random share of the tokens of each crop.

    Thus training covers all shares of known tokens equally. So does decoding with the format's
    schedules, whose stages grow by a power law.
    """
    count, height, width = crops.tokens.shape
    size = height * width
    hidden = 1 + generator.integers(size, size=(count, 1))
    ranks = generator.permuted(np.tile(np.arange(size), (count, 1)), axis=1)
    unknown = torch.from_numpy(ranks < hidden)
    tokens = crops.tokens.view(count, size)
    batch = DirectBatch(
        masked_plan(np.ones((height, width), np.int32)).entries,
        tokens.masked_fill(unknown, UNKNOWN),
        crops.rows.repeat_interleave(width, 1),
        crops.columns.repeat(1, height),
        crops.sizes,
    )
    weights = unknown / torch.from_numpy(hidden * count).to(torch.float32)
    return DirectExamples(batch, tokens, weights)


def masked_model(shared: SharedRun, data: Path, out: Path) -> IntTransformer:
    """Train the paper's re-reading masked model with the shared model's sizes and settings.

    Args:
        shared: the shared run.
        data: token maps for ``TokenMaps``.
        out: folder for checkpoint.pt, log.csv and entropy/. An interrupted run in it resumes, and a
            finished run is used as it is.

    Returns:
        The integer form on the executor "torch".

    Raises:
        ValueError: token maps or a run in ``out`` do not match.
        RuntimeError: training was interrupted.
    """
    maps = TokenMaps(data)
    config = replace(shared.config, real_orders=1.0, default_orders=1.0)  # orders are not used

    def draw(generator: np.random.Generator) -> DirectExamples:
        shape = config.shapes[int(generator.integers(len(config.shapes)))]
        return masked_examples(generator, maps.draw(generator, shape, config))

    torch.manual_seed(shared.loop.seed)
    stage = DirectStage(config, maps.counts(), draw)
    facts = {"data": digest([*maps.maps, *maps.held_out])}
    model = finished(stage, maps.size_classes(), shared.loop, out, facts)
    return IntTransformer(model.config, model.tensors)
