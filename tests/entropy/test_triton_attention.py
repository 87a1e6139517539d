"""Stage attention in Triton: interpreted against plain torch, compiled ahead of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from percov2 import triton_kernels
from percov2.entropy import schedule, visibility
from percov2.entropy.torch.reader_plan import plan_readers
from tools.compiled_kernels import (
    CAPABILITIES,
    attention_source,
    compare_on,
    compile_kernel,
    needs_triton,
)


@needs_triton
def test_interpreted_kernel_agrees_with_plain_torch() -> None:
    compare_on("cpu", "compare_attention.py")


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_attention_compiles_without_spills(head_dim: int, capability: int) -> None:
    report = compile_kernel(attention_source(head_dim), capability)
    assert report.stack == 0, report
    assert report.registers <= 128, report  # four programs of four warps on a multiprocessor
    # A group of keys, and of values, is one load per thread.
    assert report.loads[4 * head_dim // 2] >= 1, report
    assert report.shared <= 48 * 1024, report
    assert report.tensor_cores, report


def test_every_reader_has_a_block_with_all_that_it_sees() -> None:
    grids = {"qlds12": (1, 1), "var": (9, 50), "checkerboard": (40, 33), "raster": (9, 9)}
    for name, shape in grids.items():
        stages = schedule.stages(name, *shape)
        coding = schedule.order(stages)
        stage = stages.reshape(-1)[coding]
        keys = visibility.join(
            visibility.start_entries(), visibility.content_entries(stage, coding, shape[1])
        )
        for reader in (keys, visibility.query_entries(stage, coding, shape[1])):
            places, readers, first, listed = (
                part.numpy() for part in plan_readers(reader, keys, torch.device("cpu"), 32, 64)
            )
            assert np.array_equal(places[1], reader.reads)
            at = reader.row >= 0
            assert np.array_equal(places[0] // 2**16 == reader.row, at)
            assert np.array_equal((places[0] % 2**16)[at], reader.column[at])
            assert sorted(readers[readers >= 0]) == list(range(len(reader)))
            seen = visibility.visible(reader, keys)
            for i, block in enumerate(readers):
                mine, place, stage = listed[:, first[i] : first[i + 1]]
                assert len(mine) % 64 == 0
                real = stage < visibility.NEVER
                mine = mine[real]
                assert len(set(mine)) == len(mine)
                assert np.array_equal(stage[real], keys.key_stage[mine])
                known = keys.row[mine] * 2**16 + keys.column[mine]
                known[:3] = (2**15 - 1) * 2**16 + np.arange(3)
                assert np.array_equal(place[real], known)
                hidden = np.delete(np.arange(len(keys)), mine)
                assert not seen[np.ix_(block[block >= 0], hidden)].any()


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(1, 6, 17, dtype=torch.int8)}, "queries"),
        ({"keys": torch.ones(1, 8, 8, dtype=torch.int8)}, "keys"),
        ({"values": torch.ones(1, 8, 32, dtype=torch.int8)[..., ::2]}, "strides"),
        ({"biases": torch.ones(2, 963, dtype=torch.int16)}, "biases"),
        ({"shifts": torch.ones(2)}, "shifts"),
        ({"gain_bits": 6}, "gain_bits"),
        ({"weights": torch.ones(128)}, "weights"),
        ({"plan": 0}, "reader_places"),
        ({"plan": 1}, "readers"),
        ({"plan": 3}, "listed_keys"),
        ({}, "TRITON_INTERPRET"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    stages = schedule.stages("raster", 2, 3)
    coding = schedule.order(stages)
    stage = stages.reshape(-1)[coding]
    keys = visibility.join(
        visibility.start_entries(), visibility.content_entries(stage[:5], coding[:5], 3)
    )
    queries = visibility.query_entries(stage, coding, 3)
    plan = plan_readers(queries, keys, torch.device("cpu"), *triton_kernels.attention_blocks())
    if "plan" in change:  # one of its tensors loses its last element
        wrong = [part[..., :-1] if i == change["plan"] else part for i, part in enumerate(plan)]
        change = {"plan": tuple(wrong)}
    good = {
        "queries": torch.ones(1, 6, 16, dtype=torch.int8),
        "keys": torch.ones(1, 8, 16, dtype=torch.int8),
        "values": torch.ones(1, 8, 16, dtype=torch.int8),
        "plan": plan,
        "biases": torch.ones(2, 964, dtype=torch.int16),
        "shifts": torch.full((2,), 6, dtype=torch.int8),
        "gain_bits": 1,
        "weights": torch.ones(128, dtype=torch.int8),
    }
    with pytest.raises(ValueError, match=message):
        triton_kernels.attention(**{**good, **change})
