"""Entropy schedules against the oracle, and frozen: they are part of the file format."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles import independent_model
from percov2.entropy.schedule import (
    DEFAULT_SCHEDULE,
    MAX_POSITIONS,
    SCHEDULES,
    _power_law_ends,
    _qlds_walk,
    order,
    stages,
)

pytestmark = pytest.mark.core

sides = st.one_of(st.integers(1, 40), st.integers(1, 120))
names = st.sampled_from(SCHEDULES)

# SHA-256 over "height width\n" and the int32-LE stage map of each of GOLDEN_GRIDS. A file that was
# written yesterday decodes by these maps: a new value here is a new format version.
GOLDEN_GRIDS = ((1, 1), (1, 9), (5, 7), (8, 8), (16, 16), (32, 32), (32, 48), (61, 3), (128, 96))
GOLDEN = {
    "qlds12": "dd42a0656d6269f2971b8b9e96c44fe2349649bab056b8514872f31ecf5dbc87",
    "quincunx": "98d03a9565f9eee619ee6a0cf62410ac81e34708f8ba68676c9d562de6b62da4",
    "checkerboard": "1cc2775d58facaeb9675f6fd7c5e577240023d9734c8e79f0fcf9722c51943f3",
    "var": "abd67f29f576aa25b0b098a85e7ee2160b64e7e0c079ddf5622fd6983578ee6e",
    "raster": "9f39fb1c6ce05b838e6314bcb0a75452a156d2bbaa15604d825fb13711f6a88e",
    "qlds8": "0be843d4b1ac29d7c02f4d1e9f9fe7dd774ff504d607d9619d13d4d5b7caa8f4",
    "qlds5": "59b31c02fd078fdbc1daf8f2b705173b41125f603c9209ed220bf3e8c05de5b5",
}


@given(name=names, height=sides, width=sides)
@example(name="qlds12", height=1, width=1)
@example(name="var", height=5, width=7)
@example(name="quincunx", height=33, width=2)
@example(name="qlds8", height=97, width=290)
@settings(max_examples=120, deadline=None)
def test_stages_equal_the_oracle_and_order_is_by_stage_then_raster(
    name: str, height: int, width: int
) -> None:
    stage_map = stages(name, height, width)
    assert (stage_map.shape, stage_map.dtype) == ((height, width), np.int32)
    flat = stage_map.reshape(-1).tolist()
    assert flat == independent_model.stage_map(SCHEDULES.index(name), height, width)
    assert set(flat) == set(range(1, max(flat) + 1))  # every stage has positions
    coding = order(stage_map)
    assert coding.dtype == np.int64
    assert coding.tolist() == sorted(range(height * width), key=lambda p: (flat[p], p))


@given(positions=st.integers(1, MAX_POSITIONS), count=st.sampled_from([5, 8, 12]))
@settings(max_examples=100, deadline=None)
def test_power_law_is_exact(positions: int, count: int) -> None:
    ends = _power_law_ends(positions, count).tolist()
    assert ends == independent_model.power_law_ends(positions, count)
    assert ends[-1] == positions
    assert all(a < b for a, b in zip([0, *ends], ends, strict=False))


def test_walk_that_gives_up_ends_in_raster_order() -> None:
    # On this grid the walk has not met every position after 16 N + 64 steps.
    height, width = 7, 4096
    walk = _qlds_walk(height, width)
    assert np.array_equal(np.sort(walk), np.arange(height * width))
    assert walk.tolist() == independent_model.qlds_walk(height, width)
    n = np.arange(1, 16 * height * width + 65)
    rows = ((2**31 + n * 3242174889) % 2**32 * height) >> 32
    columns = ((2**31 + n * 2447445414) % 2**32 * width) >> 32
    missed = np.setdiff1d(np.arange(height * width), rows * width + columns)
    assert len(missed) > 0
    assert walk[-len(missed) :].tolist() == missed.tolist()


def test_quincunx_of_the_paper() -> None:
    # PerCoV2: on 8x8, 4, 8, 16, 32, 64 tokens are known after stage 1, ..., 5.
    stage_map = stages("quincunx", 8, 8)
    assert np.cumsum(np.bincount(stage_map.reshape(-1))[1:]).tolist() == [4, 8, 16, 32, 64]
    rows, columns = np.indices((8, 8))
    assert ((stage_map == 1) == ((rows % 4 == 0) & (columns % 4 == 0))).all()
    assert ((stage_map == 2) == ((rows % 4 == 2) & (columns % 4 == 2))).all()
    assert ((stage_map == 4) == ((rows % 2 == 1) & (columns % 2 == 1))).all()
    assert ((stage_map == 5) == ((rows + columns) % 2 == 1)).all()


@pytest.mark.parametrize(
    ("name", "height", "width", "message"),
    [
        ("spiral", 8, 8, "unknown schedule 'spiral'"),
        ("raster", 0, 8, "0x8"),
        ("raster", 8, -1, "8x-1"),
        ("raster", 8192, 8192, "8192x8192"),
    ],
)
def test_refuses_bad_arguments(name: str, height: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stages(name, height, width)
    with pytest.raises(ValueError, match="read-only"):
        stages("qlds12", 4, 4)[0, 0] = 3


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden(name: str) -> None:
    digest = hashlib.sha256()
    for height, width in GOLDEN_GRIDS:
        digest.update(f"{height} {width}\n".encode())
        digest.update(stages(name, height, width).astype("<i4").tobytes())
    assert digest.hexdigest() == GOLDEN[name]


def test_names_keep_their_index_and_the_document_holds_the_golden_hashes() -> None:
    assert tuple(GOLDEN) == SCHEDULES  # names are the index in the file
    assert SCHEDULES[0] == DEFAULT_SCHEDULE
    page = Path(__file__).parents[2] / "docs" / "reference" / "schedules.md"
    document = page.read_text(encoding="utf-8")
    for index, name in enumerate(SCHEDULES):
        assert f"| `{name}` | `{GOLDEN[name]}` |" in document
        assert re.search(rf"^\| {index}( \(default\))? \| `{name}` \|", document, re.MULTILINE)
        assert f"(../images/schedule_{name}.png)" in document
