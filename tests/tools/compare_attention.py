"""Stage attention on a device, against plain torch: ``compare_attention.py cpu`` or cuda."""

from __future__ import annotations

import sys

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from percov2.entropy import ranges, schedule, visibility
from percov2.entropy.torch.reader_plan import plan_readers
from percov2.triton_kernels import (
    attention,
    attention_biases,
    attention_blocks,
    stage_attention,
)

DEVICE = torch.device(sys.argv[1])
WEIGHTS = torch.tensor([*ranges.WEIGHT_TABLE, 0], dtype=torch.int8)


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    biases: torch.Tensor,
    shifts: torch.Tensor,
    gain_bits: int,
) -> torch.Tensor:
    """One image and all heads, in int64: q [E, H, D], k and v [K, H, D], index [E, K]."""
    hidden = (index == visibility.HIDDEN_INDEX)[None]
    product = torch.einsum("ehd,khd->hek", q.long(), k.long())
    shift = shifts.long()[:, None, None]
    bias = torch.nn.functional.pad(biases.long(), (0, 1))[:, index]
    score = (product + (1 << shift - 1) >> shift) + bias
    score = score.masked_fill(hidden, -(2**40))
    below = score.amax(-1, keepdim=True) - score
    weight = WEIGHTS.long()[below.clamp(max=128)]
    total = weight.sum(-1).T[:, :, None]
    weighted = torch.einsum("hek,khd->ehd", weight, v.long())
    numerator = (weighted << gain_bits) + (total << 7 + gain_bits) + total // 2
    return (numerator // total - (1 << 7 + gain_bits)).clamp(-127, 127).to(torch.int8)


def compare(
    reader: visibility.Entries,
    key: visibility.Entries,
    heads: int,
    head_dim: int,
    batch: int,
    seed: int,
    spare: int = 0,
    most: int = 2**30,
) -> None:
    """Random activations; ``spare`` unused keys lie behind the planned ones.

    ``most`` limits the keys of a part of the plan.
    """
    rng = torch.Generator().manual_seed(seed)
    inner = heads * head_dim

    def activations(count: int) -> torch.Tensor:
        drawn = torch.randint(-127, 128, (batch, count, inner), generator=rng)
        return torch.where(drawn % 5 == 0, drawn.sign() * 127, drawn).to(torch.int8)

    q, both = activations(len(reader)), activations(2 * (len(key) + spare))
    both = both.view(batch, len(key) + spare, 2 * inner)
    k, v = both.split(inner, 2)
    biases = torch.randint(-2047, 2048, (heads, 964), generator=rng).to(torch.int16)
    biases //= (1, 8, 300)[seed % 3]
    shifts = torch.randint(5, 13, (heads,), generator=rng).to(torch.int8)
    gain_bits = seed % 6
    parts = plan_readers(reader, key, DEVICE, *attention_blocks(), most)
    assert (len(parts) > 1) == (most < sum(part.size for part in parts))
    queries, sides, table, shift, weights = (
        x.to(DEVICE) for x in (q, both, biases, shifts, WEIGHTS)
    )
    out = torch.zeros_like(queries)
    for part in parts:
        made = attention_biases(part, table, shift)
        attention(queries, *sides.split(inner, 2), part, made, shift, gain_bits, weights, out)
    result = out.cpu()
    index = torch.from_numpy(visibility.relative_index(reader, key).astype(np.int64))
    sizes = (heads, head_dim)
    for b in range(batch):
        expected = plain_attention(
            q[b].unflatten(1, sizes),
            k[b, : len(key)].unflatten(1, sizes),
            v[b, : len(key)].unflatten(1, sizes),
            index,
            biases,
            shifts,
            gain_bits,
        )
        assert torch.equal(result[b].unflatten(1, sizes), expected)


def grid_entries(
    name: str, height: int, width: int
) -> tuple[visibility.Entries, visibility.Entries]:
    """Keys (start entries and all contents but the last stage's) and queries of one grid."""
    stages = schedule.stages(name, height, width)
    coding = schedule.order(stages)
    stage = stages.reshape(-1)[coding]
    known = int(np.searchsorted(stage, stage[-1]))
    contents = visibility.content_entries(stage[:known], coding[:known], width)
    keys = visibility.join(visibility.start_entries(), contents)
    return keys, visibility.query_entries(stage, coding, width)


@settings(max_examples=18, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from([name for name in schedule.SCHEDULES if name != "raster"]),
    shape=st.sampled_from([(1, 1), (1, 2), (3, 5), (7, 9), (2, 40), (36, 3)]),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([1, 8, 20, 32, 33, 64]),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**20),
    contents=st.booleans(),
)
def grids(
    name: str,
    shape: tuple[int, int],
    heads: int,
    head_dim: int,
    batch: int,
    seed: int,
    contents: bool,
) -> None:
    keys, queries = grid_entries(name, *shape)
    compare(keys if contents else queries, keys, heads, head_dim, batch, seed, spare=seed % 3)


grids()
# More than a window in both directions, and readers of one stage only.
keys, queries = grid_entries("qlds5", 34, 35)
compare(queries.take(slice(0, None, 7)), keys, 1, 8, 1, seed=3)
compare(queries.take(slice(40, 300, 3)), keys.take(slice(0, 43)), 1, 16, 1, seed=4)
# A plan in parts.
compare(queries.take(slice(0, None, 9)), keys, 2, 8, 2, seed=5, most=2000)
# Nobody reads, nobody is there, and a reader with start entries only.
keys, queries = grid_entries("raster", 2, 3)
compare(queries.take(slice(0, 0)), keys, 1, 8, 1, seed=5)
compare(queries.take(slice(0, 1)), keys.take(slice(0, 3)), 2, 8, 3, seed=6)
compare(queries, keys, 2, 8, 0, seed=7)
# More images than one launch takes.
stage_attention.IMAGES = 2
compare(queries, keys, 2, 8, 5, seed=8)
print("agreed")
