"""``percov2 eval entropy``: orders, coders and the table, on small models."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oracles import independent_model
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.schedule import SCHEDULES, qlds, stages
from percov2.entropy.token_coder import TokenCoder
from percov2.evaluation.study.coders import OrderCoder, token_check, token_map, uniform_coder
from percov2.evaluation.study.comparison import compare, measure, order_methods
from percov2.evaluation.study.page import page, panels, saved
from percov2.evaluation.study.schedules import STUDY_SCHEDULES, StudySchedule
from percov2.training.stage2 import integer_bits
from tools.command_line import failure, run

FROZEN = Path(__file__).parents[1] / "data" / "entropy_v1"
GRIDS = ((1, 1), (1, 9), (7, 1), (5, 7), (8, 8), (12, 9))


@pytest.fixture(scope="module")
def coder() -> TokenCoder:
    return TokenCoder(IntTransformer.load(FROZEN))


def grid(height: int, width: int, codebook_size: int = 16) -> np.ndarray:
    """Smooth tokens made of integers only: int32 [height, width]."""
    y, x = np.mgrid[:height, :width]
    return ((np.abs(7 * y - 3 * x) // 4 + y * x // 9) % codebook_size).astype(np.int32)


def slow_every_side(height: int, width: int) -> list[int]:
    def first(r: int, c: int) -> int:
        for s in range(1, max(height, width) + 1):
            rows, columns = ({i * n // s for i in range(s)} for n in (height, width))
            if r in rows and c in columns:
                return s
        raise AssertionError("the last side has every position")

    return independent_model.ranks([first(r, c) for r in range(height) for c in range(width)])


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_orders_are_what_they_are_called(height, width):
    made = {name: order(height, width) for name, (_, order) in STUDY_SCHEDULES.items()}
    for name in SCHEDULES:
        assert np.array_equal(made[name], stages(name, height, width))
    assert made["var_every_side"].reshape(-1).tolist() == slow_every_side(height, width)
    walk = independent_model.qlds_walk(height, width)
    for count in (5, 8, 12):
        size = min(count, height * width)
        labels = made[f"qlds{count}_flat"].reshape(-1)[walk]
        # Groups follow each other and end at N * i / S, rounded halves up.
        ends = [
            int(Fraction(height * width * i, size) + Fraction(1, 2)) for i in range(1, size + 1)
        ]
        assert labels.tolist() == sorted(labels)
        assert np.bincount(labels)[1:].cumsum().tolist() == ends
    assert all(m.dtype == np.int32 and m.shape == (height, width) for m in made.values())


def test_the_power_of_qlds_is_the_format_s_unless_given():
    assert np.array_equal(qlds(8, 8, 12), stages("qlds12", 8, 8))
    assert np.array_equal(qlds(8, 8, 12, Fraction(11, 5)), stages("qlds12", 8, 8))
    assert not np.array_equal(qlds(8, 8, 12, Fraction(1)), stages("qlds12", 8, 8))


def test_a_stage_map_codes_as_its_name_does(coder):
    tokens = token_map(grid(6, 11))
    for name in SCHEDULES:
        mapped = OrderCoder(coder, STUDY_SCHEDULES[name].stages)
        named = OrderCoder(coder, lambda height, width, name=name: name)
        assert mapped.encode(tokens) == named.encode(tokens)
    with pytest.raises(ValueError, match=r"\(2, 3\) for a token grid of 6x11"):
        OrderCoder(coder, lambda height, width: np.ones((2, 3), np.int32)).encode(tokens)


@pytest.mark.parametrize("name", STUDY_SCHEDULES)
def test_payloads_cost_what_their_stages_say(coder, name):
    order = STUDY_SCHEDULES[name].stages
    study = OrderCoder(coder, order)
    for height, width in GRIDS:
        tokens = token_map(grid(height, width))
        payload = study.encode(tokens)
        assert np.array_equal(study.decode(payload, (height, width)), tokens.tokens)
        bits = study.stage_bits(tokens)
        assert [len(part) for part in bits] == np.bincount(order(height, width).flat)[1:].tolist()
        # The check is the first state: a small one is fewer bits than 16, but rounds coarsely.
        check = np.log2(token_check(tokens.tokens) + 1)
        assert check <= 16
        assert -0.01 < len(payload) - (sum(part.sum() for part in bits) + check) / 8 < 9 / 8
        if name in SCHEDULES:
            known = integer_bits(coder, [grid(height, width)], name) * height * width
            assert sum(part.sum() for part in bits) == pytest.approx(known)
        broken = bytes([payload[0] ^ 1]) + payload[1:]
        with pytest.raises(ValueError, match="does not match"):
            study.decode(broken, (height, width))


def test_measuring_sums_up_and_notices_a_wrong_decoder(coder):
    maps = [token_map(grid(h, w)) for h, w in GRIDS]
    study = OrderCoder(coder, STUDY_SCHEDULES["quincunx"].stages)
    record = measure(study, maps, "quincunx", progress=False)
    assert record["maps"] == len(GRIDS)
    assert record["tokens"] == sum(record["stage_tokens"]) == sum(h * w for h, w in GRIDS)
    total = record["bits_per_token"] * record["tokens"]
    assert np.dot(record["stage_bits"], record["stage_tokens"]) == pytest.approx(total)
    assert record["bytes"] == np.mean([len(study.encode(tokens)) for tokens in maps])
    assert abs(record["bytes"] - record["ideal_bytes"]) < 1
    assert record["ideal_bytes"] == pytest.approx((total / len(maps) + 16) / 8)
    counts = [int(stages("quincunx", h, w).max()) for h, w in GRIDS]
    assert (record["stages"], record["most_stages"]) == (np.mean(counts), max(counts))
    assert record["encode_s"] > 0 and record["decode_s"] > 0

    class Liar(OrderCoder):
        def decode(self, payload: bytes, shape: tuple[int, int]) -> np.ndarray:
            return (super().decode(payload, shape) + 1) % 16

    with pytest.raises(RuntimeError, match="decoded wrongly"):
        measure(Liar(coder, STUDY_SCHEDULES["var"].stages), maps, "liar", progress=False)
    with pytest.raises(ValueError, match="no token maps"):
        measure(study, [], "none", progress=False)


def test_uniform_coding_costs_log2_of_the_codebook():
    tokens = token_map(grid(5, 7, 256))
    study = uniform_coder(256)
    assert [part.tolist() for part in study.stage_bits(tokens)] == [[8.0] * 35]
    assert len(study.encode(tokens)) == 35 + 2


@pytest.fixture
def few(monkeypatch) -> dict[str, StudySchedule]:
    """The orders that are compared, fewer than there are."""
    few = {name: STUDY_SCHEDULES[name] for name in ("var", "qlds5_flat", "raster")}
    monkeypatch.setattr("percov2.evaluation.study.comparison.STUDY_SCHEDULES", few)
    return few


def test_the_table_is_of_the_report(few, coder, tmp_path):
    maps = [token_map(grid(h, w)) for h, w in ((5, 7), (8, 8))]
    facts = {"rate": "r", "codebook_size": 16, "token_side": 32}
    facts["command"] = "percov2 eval entropy …"
    methods = order_methods("shared", lambda name, order: OrderCoder(coder, order), maps, draw=True)
    noted = (method._replace(note="A note.") for method in methods)
    report = compare(maps, noted, facts, tmp_path, progress=False)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.md").read_text() == page(report)
    uniform, *rows = report["methods"]
    assert uniform["bits_per_token"] == 4
    assert [row["name"] for row in rows] == list(few)
    text = page(report)
    row = next(row for row in rows if row["name"] == "var")
    assert saved(row, uniform) == pytest.approx(
        (100 - 100 * row["bytes"] / uniform["bytes"], 100 - 25 * row["bits_per_token"])
    )
    assert f"| {row['bytes']:.2f} | {saved(row, uniform)[0]:.1f} % |" in text
    assert text.count("A note.") == 1 and "percov2 eval entropy …" in text
    # The raster has 64 stages, which are not listed.
    assert text.count("| raster | shared |") == 1 and text.count(f"| {row['title']} |") == 2
    for name in few:
        with Image.open(tmp_path / f"schedule_{name}.png") as picture:
            assert f"](schedule_{name}.png)" in text
            assert picture.width >= 200 and len(picture.convert("RGB").getcolors(10**6)) > 10


def test_panels_show_what_is_known():
    order = stages("quincunx", 8, 8)
    shown = panels(order)
    assert [int((panel > 0).sum()) for panel in shown] == [4, 8, 16, 32, 64]
    assert [int((panel == 2).sum()) for panel in shown] == [4, 4, 8, 16, 32]
    assert all(np.array_equal(a > 0, b == 1) for a, b in pairwise(shown))


@pytest.fixture
def token_file(tmp_path) -> Path:
    """Maps of the random model's rate "fine"."""
    maps = {f"tokens_{i}": grid(4 + i % 2, 5, 64) + i for i in range(6)}
    held_out = np.arange(6) % 3 == 2
    np.savez(tmp_path / "tokens.npz", codebook_size=np.int32(64), held_out=held_out, **maps)
    return tmp_path / "tokens.npz"


def test_the_command_measures_held_out_maps(few, token_file, random_model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ("eval", "entropy", "--data", token_file, "--model", random_model, "--out", out)
    assert run(*command, "--rate", "fine") == 0
    assert capsys.readouterr().out == f"{out / 'report.md'}\n"
    report = json.loads((out / "report.json").read_text())
    assert report["command"].endswith("--rate fine --data tokens.npz --out out")
    assert [row["name"] for row in report["methods"]] == ["uniform", *few]
    assert {(row["maps"], row["tokens"]) for row in report["methods"]} == {(2, 45)}
    shared = TokenCoder(IntTransformer.load(random_model / "fine" / "entropy"))
    held_out = [grid(4, 5, 64) + 2, grid(5, 5, 64) + 5]
    for row in report["methods"]:
        if row["name"] in SCHEDULES:
            expected = integer_bits(shared, held_out, row["name"])
            assert row["bits_per_token"] == pytest.approx(expected)
    assert (out / "schedule_raster.png").is_file()
    assert "codebook of 64 entries, but rate coarse has 300" in failure(
        capsys, *command, "--rate", "coarse"
    )
