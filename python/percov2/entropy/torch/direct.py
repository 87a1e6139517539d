"""Entries that are keys, readers and read out at once: the baselines' way to use the transformer.

The format's entries are contents, which are keys, and queries, which are read out (entries.py).
Two methods that it is compared with have one entry per token instead:

* the paper's re-reading masked model (PerCoV2, arXiv 2503.09368; MaskGIT): unknown tokens are
  entries with a mask payload, all entries see each other, and every stage reads everything anew;
* explicit hierarchical VAR (arXiv 2404.02905): an entry of scale g has (g, g) and its payload comes
  from the scales below g.

Layers, embeddings and head are the transformer's, in the float, the rounded and the integer form,
so a model is trained, exported and stored as every other; the mask is the embedding ``query``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from percov2.entropy import ranges
from percov2.entropy.torch import intmath
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

UNKNOWN = -1
"""Payload of an entry that knows no token."""


@dataclass(frozen=True)
class DirectPlan:
    """How the tokens of a grid are coded, E in all, one entry each.

    Attributes:
        entries: [E], in the grid's coordinates, key_stage = reads >= 1: its block.
        stage: int64 [E], 1 .. S: when the token is coded. The entries of stage s see those of
            blocks up to the largest of stage s.
        source: int64 [E]: the index of the token that is the entry's payload once it is known, -1
            for none.
        first: int64 [E]: where the token's codebook begins in the embedding and in the logits.
    """

    entries: Entries
    stage: NDArray[np.int64]
    source: NDArray[np.int64]
    first: NDArray[np.int64]

    def payload(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Payloads [..., E] of tokens [..., E], each in its codebook, UNKNOWN where not known."""
        known = np.where(tokens == UNKNOWN, UNKNOWN, tokens + self.first)
        return np.where(self.source < 0, UNKNOWN, known[..., self.source]).astype(np.int64)


def masked_plan(stage_map: NDArray[np.int32]) -> DirectPlan:
    """The re-reading masked model on a grid in the stages of int32 [h, w]: one block."""
    size = stage_map.size
    raster = np.arange(size, dtype=np.int64)
    entries = content_entries(np.ones(size, np.int32), raster, stage_map.shape[1])
    return DirectPlan(
        entries, stage_map.reshape(-1).astype(np.int64), raster, np.zeros_like(raster)
    )


@dataclass(frozen=True)
class DirectBatch:
    """Equal entries of several grids (or crops), and what each of them knows.

    entries: [E], as in :class:`DirectPlan`; payload int64 [B, E]: a token
    or UNKNOWN; rows, columns int64 [B, E]: sixteenths of the whole grid; sizes int64 [B, 2]:
    classes of the whole grid's sides.
    """

    entries: Entries
    payload: Tensor
    rows: Tensor
    columns: Tensor
    sizes: Tensor


def direct_logits(model: TokenTransformer, batch: DirectBatch) -> Tensor:
    """Logits in nats of all entries, float32 [B, E, V], in the form that the model is in."""
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
    """Who is where and sees whom, of K start entries and entries.

    Relative positions int64 [K, K], 0 where there is none, and what must not be seen, HIDDEN_SCORE
    or 0, float32 [K, K].
    """
    every = join(start_entries(), entries)
    index = torch.from_numpy(relative_index(every, every).astype(np.int64))
    hidden = index == HIDDEN_INDEX
    mask = hidden.to(torch.float32).mul_(ranges.HIDDEN_SCORE)
    return index.masked_fill(hidden, 0), mask


def int_direct_logits(
    model: IntTransformer, entries: Entries, payload: NDArray[np.int64], shape: tuple[int, int]
) -> Tensor:
    """Base-2 logits of all entries of one grid, int16 [E, V]: the integer form.

    Args:
        model: run by the executor "torch" (the others know contents and queries only).
        entries: [E], as in :class:`DirectPlan`.
        payload: [E], a token or UNKNOWN.
        shape: rows and columns of the grid.

    Raises:
        ValueError: a model that another executor runs.
        RuntimeError: torch is set to reduced precision.
    """
    if model.executor_name != "torch":
        raise ValueError(f"executor {model.executor_name!r} runs the model; it must be 'torch'")
    executor = model.executor
    raster = entries.row.astype(np.int64) * shape[1] + entries.column
    place = executor.place_payload(*shape, torch.from_numpy(raster).to(model.device))
    tokens = torch.from_numpy(payload).to(model.device)
    contents = executor.content_payload(tokens.clamp(min=0)[None], place)
    known = (tokens != UNKNOWN)[None, :, None]
    residual = torch.where(known, contents, executor.query_payload(1, place))
    residual = torch.cat([executor.start_payload(*shape)[None], residual], 1)
    every = join(start_entries(), entries)
    plan = executor.plan(every, every)
    with intmath.exact_float32(model.device):
        for layer in executor.layers:
            residual = layer.advance(residual, *layer.keys_values(residual), plan)
        return model.logits(residual[:, START_ENTRIES:])[0]
