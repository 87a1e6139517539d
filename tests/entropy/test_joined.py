"""Grids of unequal sizes and schedules in joint passes: the same integers, bytes and tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from percov2.codec import Codec
from percov2.entropy import schedule
from percov2.entropy.torch import int_transformer, triton_executor
from percov2.entropy.torch.int_transformer import IntTransformer
from percov2.entropy.torch.token_coder import TokenCoder
from percov2.entropy.transformer_config import TransformerConfig
from tools.compiled_kernels import needs_triton
from tools.executors import coder_of, random_on, same
from tools.launches import Operators, count_kernels

CONFIG = TransformerConfig(codebook_size=16, dim=8, heads=2, head_dim=4, layers=2, hidden=8)
Grid = tuple[NDArray[np.int32], schedule.Schedule]
"""Tokens [h, w] and their schedule."""


def grid_of(shape: tuple[int, int], order: schedule.Schedule, seed: int = 0) -> Grid:
    return np.random.default_rng(seed).integers(0, 16, shape, np.int32), order


@st.composite
def any_grid(draw: st.DrawFn) -> Grid:
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 20)))
    seed = draw(st.integers(0, 99))
    if draw(st.booleans()):
        return grid_of(shape, draw(st.sampled_from(schedule.SCHEDULES)), seed)
    count = draw(st.integers(1, min(6, shape[0] * shape[1])))
    stages = np.arange(shape[0] * shape[1], dtype=np.int32) % count + 1
    np.random.default_rng(seed).shuffle(stages)
    return grid_of(shape, stages.reshape(shape), seed)


def assert_as_alone(coder: Any, oracle: Any, grids: list[Grid]) -> None:
    """``coder`` joins the grids; ``oracle`` codes one after the other."""
    tokens, orders = [grid for grid, _ in grids], [order for _, order in grids]
    alone = [oracle.code(grid[None], order) for grid, order in grids]
    coded = coder.code_joined(tokens, orders)
    checks = [257 * i % 65536 for i in range(len(grids))]
    buffer, offsets = coded.encode(checks).finish()
    for i, (one, grid) in enumerate(zip(alone, tokens, strict=True)):
        assert coded.stage_count(i) == one.stage_count(0)
        for joint, single in ((coded._starts, one._starts), (coded._freqs, one._freqs)):
            assert joint[i, : grid.size].tolist() == single[0].tolist()
        expected = one.encode(checks[i : i + 1]).finish()[0]
        assert buffer[offsets[i] : offsets[i + 1]].tobytes() == expected.tobytes()
    seen: list[list[int]] = []
    decoder = coder.decoder(buffer, offsets)
    found = coder.decode_joined(
        decoder, orders, [grid.shape for grid in tokens], lambda left: seen.append(left.tolist())
    )
    assert all(same(a, b) for a, b in zip(found, tokens, strict=True))
    assert decoder.finished(checks).all()
    ends = [one._ends[0].tolist() for one in alone]
    stages = max(len(end) for end in ends) - 1
    assert seen == [[end[-1] - end[min(g, len(end) - 1)] for end in ends] for g in range(stages)]


@pytest.fixture(scope="module")
def oracle() -> Any:
    return coder_of(random_on("cpu", CONFIG, 3))


@pytest.fixture(scope="module")
def coder() -> TokenCoder:
    return TokenCoder(random_on("torch", CONFIG, 3))


@settings(max_examples=40, deadline=None)
@given(st.lists(any_grid(), min_size=1, max_size=6))
@example([grid_of((1, 1), "raster")])
@example([grid_of((1, 1), "qlds12"), grid_of((1, 9), "raster"), grid_of((1, 1), "var", 1)])
@example([grid_of((5, 6), "qlds5", i) for i in range(3)])
def test_joined_grids_are_coded_as_alone(coder: TokenCoder, oracle: Any, grids: list) -> None:
    assert_as_alone(coder, oracle, grids)


def test_neither_the_order_nor_the_neighbours_matter(coder: TokenCoder) -> None:
    grids = [
        grid_of((3, 40), "qlds12", 1),
        grid_of((2, 2), "raster", 2),
        grid_of((3, 40), "qlds12", 3),
        grid_of((33, 2), "checkerboard", 4),
    ]
    expected = [
        coder.code(grid[None], order).encode([i]).finish()[0]
        for i, (grid, order) in enumerate(grids)
    ]
    for chosen in (*itertools.permutations(range(4)), (2, 0), (1,)):
        coded = coder.code_joined([grids[i][0] for i in chosen], [grids[i][1] for i in chosen])
        buffer = coded.encode(list(chosen)).finish()[0]
        assert buffer.tobytes() == b"".join(expected[i].tobytes() for i in chosen)


def test_each_grid_may_send_its_own_number_of_stages(coder: TokenCoder, oracle: Any) -> None:
    grids = [grid_of((4, 9), "qlds5", 1), grid_of((3, 3), "qlds12", 2), grid_of((2, 8), "var", 3)]
    coded = coder.code_joined([grid for grid, _ in grids], [order for _, order in grids])
    rows, sent = [2, 0], [1, 3]
    buffer = coded.encode([5, 6], sent=sent, rows=rows).finish()[0].tobytes()
    alone = [
        oracle.encode(grids[row][0][None], grids[row][1], [check], sent=last).finish()[0].tobytes()
        for row, last, check in zip(rows, sent, [5, 6], strict=True)
    ]
    assert buffer == b"".join(alone)
    seen: list[list[int]] = []
    orders, shapes = [grids[row][1] for row in rows], [grids[row][0].shape for row in rows]
    found = coder.decode_joined(
        coder.decoder(*coded.encode([5, 6], sent=sent, rows=rows).finish()),
        orders,
        shapes,
        lambda left: seen.append(left.tolist()),
        sent=sent,
        seeds=[8, 9],
    )
    for i, (order, shape) in enumerate(zip(orders, shapes, strict=True)):
        decoder = oracle.decoder(alone[i], np.array([0, len(alone[i])]))
        assert same(found[i], oracle.decode(decoder, order, *shape, sent=sent[i], seed=8 + i)[0])
    ends = [oracle.code(grids[row][0][None], grids[row][1])._ends[0] for row in rows]
    left = [[int(e[s] - e[min(g, s)]) for e, s in zip(ends, sent, strict=True)] for g in range(3)]
    assert seen == left
    with pytest.raises(ValueError, match="6 stages of a schedule that has"):
        coded.encode([5, 6], sent=[1, 6], rows=rows)
    with pytest.raises(ValueError, match="6 stages of a schedule that has"):
        coder.decode_joined(coder.decoder(b"", np.zeros(3, np.int64)), orders, shapes, sent=[6, 1])


def test_several_calls_for_the_logits_change_nothing(
    monkeypatch: pytest.MonkeyPatch, coder: TokenCoder, oracle: Any
) -> None:
    monkeypatch.setattr(TokenCoder, "_logits_at_once", lambda self: 16 * 7)
    assert_as_alone(coder, oracle, [grid_of((4, 9), "qlds5"), grid_of((5, 3), "checkerboard")])


@pytest.mark.parametrize("wrong", [-1, 16])
def test_wrong_tokens_are_refused(coder: TokenCoder, wrong: int) -> None:
    grids = [np.zeros((2, 3), np.int32), np.full((1, 1), wrong, np.int32)]
    with pytest.raises(ValueError, match=rf"{wrong}.*codebook has 16"):
        coder.code_joined(grids, ["raster", "raster"])


def test_the_entries_of_few_grids_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from percov2.entropy.torch import executor

    model = random_on("torch", CONFIG, 3)
    monkeypatch.setattr(executor, "_KEPT_TOKENS", 40)
    maps = [schedule.stages("qlds5", 3, width) for width in (4, 5, 6)]
    first = model.join(maps[:2]).grids.grids
    assert model.join(maps[:2][::-1]).grids.grids == first[::-1]
    model.join(maps[2:])  # 45 tokens: the grid used longest ago goes
    again = model.join(maps[:2]).grids.grids
    assert again[0] is first[0] and again[1] is not first[1]


def counts_of(model: IntTransformer, grids: int) -> dict[str, tuple[int, int]]:
    """Kernels, and operators of torch that compute or copy, of encoding and of decoding."""
    coder = TokenCoder(model)
    coder.coder_name = "cuda"
    shapes = [(4 + i % 5, 6 + i) for i in range(grids)]
    names = ["qlds12"] * grids

    def decode_rows(logits: torch.Tensor, rows: torch.Tensor, bits: int) -> torch.Tensor:
        started.append("kernel")
        return torch.zeros(logits.shape[:2], dtype=torch.int32)

    work: dict[str, Callable[[], object]] = {
        "encode": lambda: coder.code_joined([np.zeros(shape, np.int32) for shape in shapes], names),
        "decode": lambda: coder.decode_joined(
            SimpleNamespace(decode_rows=decode_rows), names, shapes
        ),
    }
    found = {}
    for name, call in work.items():
        with Operators() as operators, count_kernels() as started:
            call()
        found[name] = len(started), len(operators.started)
    return found


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> IntTransformer:
    """A model of 6 layers whose kernels can be counted, but not run."""
    monkeypatch.setattr("percov2.triton_kernels.check_device", lambda device: None)
    monkeypatch.setattr(int_transformer, "_executor", lambda *_: triton_executor)
    config = TransformerConfig(codebook_size=16, dim=8, heads=1, head_dim=8, layers=6, hidden=8)
    return IntTransformer.random(config, 1, executor="triton")


@needs_triton
def test_blocks_of_grids_with_few_stages_are_kept(kernels: IntTransformer) -> None:
    maps = [schedule.stages("qlds12", 9, 12), schedule.stages("raster", 9, 12)]
    found: list[list[Any]] = []
    for _ in range(2):
        joint = kernels.join(maps).grids
        for stage in (None, 0, 5):
            kernels.executor.plans(joint, stage)
        few, many = joint.grids
        assert len(few.kept) == 3 * 2 + 1 and not many.kept
        found.append([few.kept[stage, True] for stage in (None, 0, 5)])
        assert all(blocks.key_table.base is few.kept["keys"] for blocks in found[-1])
    assert all(one is other for one, other in zip(*found, strict=True))


@needs_triton
def test_launches_do_not_depend_on_the_number_of_grids(kernels: IntTransformer) -> None:
    """Of 12 stages and 6 layers."""
    few, many, again = (counts_of(kernels, grids) for grids in (2, 24, 24))
    # A layer has seven kernels and one for the biases; LayerNorm and head follow the last.
    assert {name: kernels for name, (kernels, _) in few.items()} == {
        "encode": 6 * 8 + 2,
        "decode": 12 * (6 * 8 + 2 + 1),
    }
    assert few == many == again


@pytest.mark.cuda
@needs_triton
def test_a_card_joins_grids(oracle: Any) -> None:
    coder = TokenCoder(random_on("triton", CONFIG, 3, torch.device("cuda", 0)))
    assert coder.joins
    grids = [grid_of((1 + i % 9, 1 + 7 * i % 50), schedule.SCHEDULES[i % 5], i) for i in range(40)]
    for _ in range(2):  # the second time with kept blocks
        assert_as_alone(coder, oracle, grids)


@pytest.mark.cuda
def test_a_codec_on_a_card_writes_the_files_of_the_cpu(codec: Codec, random_model: Path) -> None:
    rng = np.random.default_rng(0)
    point = codec.config.rate(codec.config.default_rate)
    shapes = [(2 + i % 7, 3 + i % 11) for i in range(30)]
    maps = [rng.integers(0, point.codebook_size, shape, np.int32) for shape in shapes]
    sizes = [(point.token_side * h, point.token_side * w) for h, w in shapes]
    files = codec.pack(maps, sizes)
    placed = Codec.from_pretrained(random_model, device="cuda")
    with mock.patch.object(TokenCoder, "code", side_effect=AssertionError):
        assert placed.pack(maps, sizes) == files
    found = placed.decode_tokens(files)
    assert all(same(a, b) for a, b in zip(found, maps, strict=True))
