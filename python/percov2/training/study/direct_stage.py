"""Training of transformers whose entries are read out themselves: the re-reading masked model."""

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
from percov2.entropy.torch.transformer import TokenBatch, TokenTransformer, TransformerConfig
from percov2.training.stage2 import EntropyConfig, RoundedStage, TokenMaps
from percov2.training.study.runs import SharedRun, digest, finished


class DirectExamples(NamedTuple):
    """Entries, the tokens int64 [B, E] that they stand for, and what each adds to the loss.

    weights: float32 [B, E], 0 for what is known; they add up to 1.
    """

    batch: DirectBatch
    targets: Tensor
    weights: Tensor


DrawExamples = Callable[[np.random.Generator], DirectExamples]


class DirectStage(RoundedStage):
    """Entries -> bits per token of the transformer.

    Args:
        config: sizes of the transformer, and when it is rounded.
        counts: int64 [V], how often each token occurs; V is the transformer's codebook.
        draw: makes a batch.
    """

    def __init__(
        self, config: EntropyConfig, counts: NDArray[np.int64], draw: DrawExamples
    ) -> None:
        super().__init__()
        self.config, self.draw_examples = config, draw
        sizes = TransformerConfig(codebook_size=len(counts), **config.model)
        self.transformer = TokenTransformer(sizes)
        self.transformer.set_frequencies(torch.from_numpy(counts))

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`TrainingStage.forward`."""
        batch, targets, weights = self.draw_examples(generator)
        with self.precision():
            logits = direct_logits(self.transformer, batch)
        targets, weights = (part.flatten().to(logits.device) for part in (targets, weights))
        nats = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        loss = (nats * weights).sum() / math.log(2.0)
        return loss, {"bits": loss.detach()}


def masked_examples(generator: np.random.Generator, crops: TokenBatch) -> DirectExamples:
    """Crops of which a random share is unknown, each share as likely as any other.

    Then every share of known tokens is trained equally, and that is how the format's schedules
    meet them: by a power law in the stage's number, sizes follow shares.
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
    """The paper's re-reading masked model, of the shared model's sizes, steps and settings.

    Args:
        data: token maps, as for ``TokenMaps``.
        out: folder for checkpoint.pt, log.csv and entropy/; a run in it goes on, or is taken if it
            is finished.

    Returns:
        Its integer form, run by the executor "torch".

    Raises:
        ValueError: token maps or a run in ``out`` that do not fit.
        RuntimeError: it was interrupted.
    """
    maps = TokenMaps(data)
    config = replace(shared.config, real_orders=1.0, default_orders=1.0)  # orders have no say

    def draw(generator: np.random.Generator) -> DirectExamples:
        shape = config.shapes[int(generator.integers(len(config.shapes)))]
        return masked_examples(generator, maps.draw(generator, shape, config))

    torch.manual_seed(shared.loop.seed)
    stage = DirectStage(config, maps.counts(), draw)
    facts = {"data": digest([*maps.maps, *maps.held_out])}
    model = finished(stage, maps.size_classes(), shared.loop, out, facts)
    return IntTransformer(model.config, model.tensors)
