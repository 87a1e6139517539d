"""One layer's attention alone: the compiled kernel beside torch's under the same mask."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.bench.model import FLOAT_CHUNKS, torch_threads
from percov2.bench.own_coder import require
from percov2.bench.timing import Effort, Timing, measure
from percov2.entropy import intmath, rans, schedule
from percov2.entropy.entries import (
    HIDDEN_INDEX,
    content_entries,
    join,
    query_entries,
    relative_index,
    start_entries,
)
from percov2.entropy.int_transformer import random_tensors
from percov2.entropy.transformer_config import TransformerConfig


class AttentionCase:
    """Random activations for all entries of one pass.

    Attributes:
        q: int8 [B, E, inner]; kv: int8 [B, K, 2 * inner], keys first.
        index: int64 [E, K], which relative position each pair has.
    """

    def __init__(self, config: TransformerConfig, name: str, side: int, images: int) -> None:
        self.config, self.name, self.side, self.images = config, name, side, images
        self.stages = np.ascontiguousarray(schedule.stages(name, side, side))
        coding = schedule.order(self.stages)
        stage = self.stages.reshape(-1)[coding]
        known = int(np.searchsorted(stage, stage[-1]))
        keys = join(start_entries(), content_entries(stage[:known], coding[:known], side))
        readers = join(keys, query_entries(stage, coding, side))
        self.index = torch.from_numpy(relative_index(readers, keys).astype(np.int64))
        rng = np.random.default_rng(0)
        inner = config.inner
        self.q = rng.integers(-127, 128, (images, len(readers), inner), dtype=np.int8)
        self.kv = rng.integers(-127, 128, (images, len(keys), 2 * inner), dtype=np.int8)
        tensors = random_tensors(config, 0)
        self.bias = tensors["layers.0.attention.bias"]
        self.shift = tensors["layers.0.attention.shift"]
        self.gain_bits = int(tensors["layers.0.attention.gain_bits"])

    def compiled(self) -> NDArray[np.int8]:
        """The kernel's result: int8 [B, E, inner]."""
        return rans.stage_attention(
            self.stages, self.bias.numpy(), self.shift.numpy(), self.gain_bits, self.q, self.kv
        )

    def heads(self, image: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of one image as float32 [heads, entries, head_dim]."""
        k, v = np.split(self.kv[image], 2, axis=-1)
        split = (torch.from_numpy(part).to(torch.float32) for part in (self.q[image], k, v))
        q, key, value = (
            part.unflatten(1, (self.config.heads, -1)).transpose(0, 1).contiguous()
            for part in split
        )
        return q, key, value

    def oracle(self, image: int) -> NDArray[np.int8]:
        """What the kernel must give for one image, by torch: int8 [E, inner]."""
        q, k, v = self.heads(image)
        bias = torch.nn.functional.pad(self.bias.to(torch.float32), (0, 1))
        bias[:, HIDDEN_INDEX] = intmath.HIDDEN_SCORE
        scale = torch.exp2(-self.shift.to(torch.float32))[:, None, None]
        scores = torch.floor(q @ k.transpose(1, 2) * scale + 0.5) + bias[:, self.index]
        weights = intmath.softmax_weights_(scores)
        mean = intmath.attention_mean(weights @ v, weights.sum(-1, keepdim=True), self.gain_bits)
        return mean.transpose(0, 1).flatten(1).to(torch.int8).numpy()


def attention(
    config: TransformerConfig, name: str, side: int, images: int, effort: Effort
) -> list[dict[str, Any]]:
    """Times of the compiled kernel and of torch's attention in float32, on one thread."""
    case = AttentionCase(config, name, side, images)
    with torch_threads(1), torch.inference_mode():
        equal = np.array_equal(case.compiled()[-1], case.oracle(images - 1))
        require(equal, "the attention kernel does not compute what torch computes")
        parts = [case.heads(image) for image in range(images)]
        q, k, v = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        mask = case.index != HIDDEN_INDEX
        timings = {"percov2": measure(case.compiled, effort)}
        by_chunk = [
            measure(partial(_float, q, k, v, mask, chunk), effort)
            for chunk in sorted({min(chunk, images) for chunk in FLOAT_CHUNKS})
        ]
        timings["float32 torch"] = min(by_chunk, key=lambda timing: timing.median_s)
    return [_record(who, case, timing) for who, timing in timings.items()]


def _float(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, chunk: int
) -> None:
    for begin in range(0, len(q), chunk):
        part = slice(begin, begin + chunk)
        torch.nn.functional.scaled_dot_product_attention(q[part], k[part], v[part], mask)


def _record(who: str, case: AttentionCase, timing: Timing) -> dict[str, Any]:
    return {
        "section": "attention",
        "coder": who,
        "schedule": case.name,
        "grid": case.side,
        "images": case.images,
        "entries": case.index.shape[0],
        "keys": case.index.shape[1],
        **asdict(timing),
        "ms_per_image": timing.median_s / case.images * 1e3,
    }
