"""Baselines that use the transformer with one entry per token.

The format has two kinds of entries: contents, which are keys, and queries, which give logits
(``percov2.entropy.visibility``). In two baselines, every entry is a key and also gives logits:

* the paper's re-reading masked model (PerCoV2, arXiv 2503.09368; MaskGIT): unknown tokens are
  entries with a mask payload, all entries see each other, and every stage reads all entries again;
* explicit hierarchical VAR (arXiv 2404.02905): an entry of scale g has the pair (key_stage, reads)
  = (g, g), and its payload comes from the scales below g.

Layers, embeddings and head are the transformer's, in the float, the rounded and the integer form.
So these models are trained, exported and stored like all others. The mask is the embedding
``query``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy import ranges
from percov2.entropy.torch import intmath
from percov2.entropy.torch.executor import places
from percov2.entropy.torch.int_transformer import IntTransformer
from percov2.entropy.torch.transformer import TokenTransformer
from percov2.entropy.visibility import (
    HIDDEN_INDEX,
    START_ENTRIES,
    Entries,
    content_entries,
    join,
    relative_index,
    start_entries,
)

__all__ = [
    "UNKNOWN",
    "DirectBatch",
    "DirectPlan",
    "direct_logits",
    "int_direct_logits",
    "masked_plan",
]


UNKNOWN = -1
"""The payload of an entry without a known token."""


@dataclass(frozen=True)
class DirectPlan:
    """The coding plan of the E tokens of a grid, with one entry for each token.

    Attributes:
        entries: [E], in the grid's coordinates. key_stage and reads are both the number of the
            entry's block, at least 1.
        stage: int64 [E] in 1 .. S, the coding stage of the token. The entries of stage s see all
            blocks up to the highest block of stage s.
        source: int64 [E], index of the token that becomes the entry's payload, or -1 for none.
        first: int64 [E], start of the token's codebook in the embedding and in the logits.
    """

    entries: Entries
    stage: NDArray[np.int64]
    source: NDArray[np.int64]
    first: NDArray[np.int64]

    def payload(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the payloads [..., E] of tokens [..., E].

        A payload is a token plus the token's ``first``, or UNKNOWN.
        """
        known = np.where(tokens == UNKNOWN, UNKNOWN, tokens + self.first)
        return np.where(self.source < 0, UNKNOWN, known[..., self.source]).astype(np.int64)


def masked_plan(stage_map: NDArray[np.int32]) -> DirectPlan:
    """Return the plan of the re-reading masked model for stages int32 [h, w]. It has one block."""
    size = stage_map.size
    raster = np.arange(size, dtype=np.int64)
    entries = content_entries(np.ones(size, np.int32), raster, stage_map.shape[1])
    return DirectPlan(
        entries, stage_map.reshape(-1).astype(np.int64), raster, np.zeros_like(raster)
    )


@dataclass(frozen=True)
class DirectBatch:
    """The payloads of B grids (or crops) that have the same entries.

    Attributes:
        entries: [E], as in :class:`DirectPlan`.
        payload: int64 [B, E], tokens or UNKNOWN.
        rows, columns: int64 [B, E], positions in sixteenths of the whole grid.
        sizes: int64 [B, 2], size classes of the whole grid's sides.
    """

    entries: Entries
    payload: Tensor
    rows: Tensor
    columns: Tensor
    sizes: Tensor


def direct_logits(model: TokenTransformer, batch: DirectBatch) -> Tensor:
    """Return the logits of all entries in nats, float32 [B, E, V], in the model's current form."""
    device = model.query.device
    table = model.embeddings()
    known = torch.cat([table["query"][None], table["token"]])[batch.payload.to(device) - UNKNOWN]
    place = table["row"][batch.rows.to(device)] + table["column"][batch.columns.to(device)]
    x = torch.cat([model.start_payload(table, batch.sizes.to(device)), known + place], 1)
    index, mask = (part.to(device) for part in _geometry(batch.entries))
    mask = mask.expand(len(x), -1, -1)
    modes = (model.quantized, model.observing)
    for layer in model.stack():
        x = layer(x, layer.keys_values(x, *modes), index, mask, *modes)
    return model.read_out(x[:, START_ENTRIES:])


def _geometry(entries: Entries) -> tuple[Tensor, Tensor]:
    """Return the relative positions and the mask of the start entries followed by ``entries``.

    With K entries in all, the positions are int64 [K, K] and 0 for hidden pairs. The mask is
    float32 [K, K]: HIDDEN_SCORE for hidden pairs and 0 elsewhere.
    """
    every = join(start_entries(), entries)
    index = torch.from_numpy(relative_index(every, every).astype(np.int64))
    hidden = index == HIDDEN_INDEX
    mask = hidden.to(torch.float32).mul_(ranges.HIDDEN_SCORE)
    return index.masked_fill(hidden, 0), mask


def int_direct_logits(
    model: IntTransformer, entries: Entries, payload: NDArray[np.int64], shape: tuple[int, int]
) -> Tensor:
    """Return the base-2 logits of all entries of one grid, int16 [E, V], from the integer form.

    Args:
        model: a model on the executor "torch". The others support only contents and queries.
        entries: [E], as in :class:`DirectPlan`.
        payload: int64 [E], tokens or UNKNOWN.
        shape: rows and columns of the grid.

    Raises:
        ValueError: another executor runs the model.
        RuntimeError: torch allows reduced precision.
    """
    if model.executor_name != "torch":
        raise ValueError(f"executor {model.executor_name!r} runs the model; it must be 'torch'")
    executor = model.executor
    raster = entries.row.astype(np.int64) * shape[1] + entries.column
    position = torch.from_numpy(raster).to(model.device)
    place = executor.place_payload(places(*shape, position))
    tokens = torch.from_numpy(payload).to(model.device)
    contents = executor.content_payload(tokens.clamp(min=0)[None], place)
    known = (tokens != UNKNOWN)[None, :, None]
    residual = torch.where(known, contents, executor.query_payload(place))
    residual = torch.cat([executor.start_payload(*shape)[None], residual], 1)
    every = join(start_entries(), entries)
    plan = executor.plan(every, every)
    with intmath.exact_float32(model.device):
        for layer in executor.layers:
            residual = layer.advance(residual, *layer.project(residual), plan)
        return model.logits(residual[:, START_ENTRIES:])[0]
