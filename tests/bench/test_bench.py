"""``percov2 bench entropy``: correct measurements and consistent reports; peers and summary."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from percov2.bench import cases, coders, entropy, fresh, model, summary
from percov2.bench.cases import Shape
from percov2.bench.entropy import middle
from percov2.bench.model import FloatTransformer
from percov2.bench.peers import Peers
from percov2.bench.report import Table, number, page, tables
from percov2.bench.timing import Effort, Timing, measure
from percov2.entropy import RansDecoder, rans, schedule
from percov2.entropy.transformer_config import TransformerConfig
from tools.command_line import failure, run
from tools.tiny_plan import MODEL, SECTIONS, SHORT, TINY

SMALL = TransformerConfig(codebook_size=9, dim=16, heads=2, head_dim=12, layers=1, hidden=32)


@pytest.fixture(scope="module")
def report() -> dict:
    return entropy.run(TINY, SECTIONS, MODEL)


# The report --------------------------------------------------------------------------------------


def test_report_survives_json_and_says_where_it_was_taken(report: dict) -> None:
    assert json.loads(json.dumps(report)) == report
    assert report["schema"] == entropy.SCHEMA
    where = report["environment"]
    assert where["torch"] == torch.__version__
    assert where["numpy"] == np.__version__
    assert where["instruction_set"] in where["instruction_sets"]
    assert where["threads"] == 1
    assert report["peers"] is None


def test_every_step_left_its_records(report: dict) -> None:
    count: dict[str, int] = {}
    for record in report["records"]:
        count[record["section"]] = count.get(record["section"], 0) + 1
    kinds = len(coders.LOGITS)
    shapes = len(TINY.compared) + len(TINY.scaling)
    # Float pass; both ways of two schedules, two further batches, a large and a raster grid, and
    # of two threads where there are two cores.
    ways = 1 + 2 * (6 + (report["environment"]["cores"] > 1))
    expected = {"coder": shapes, "logits": kinds * shapes, "overhead": 1, "long": 1}
    expected["model"], expected["attention"] = ways, 4
    assert count == expected


def test_coder_records_hold_times_and_bytes(report: dict) -> None:
    for record in report["records"]:
        if record["section"] not in ("coder", "logits"):
            continue
        for way in ("encode", "decode"):
            timing = record[way]
            assert 0 < timing["best_s"] <= timing["median_s"]
            symbols = record["tokens"] * record["images"]
            assert timing["msym_per_s"] == pytest.approx(symbols / timing["median_s"] / 1e6)
        streams = record["images"]
        # The check costs two bytes, and no stream wastes more than one.
        assert record["ideal_bytes"] + 0.9 * streams < record["bytes"]
        assert record["bytes"] < record["ideal_bytes"] + 3.5 * streams


def test_overhead_is_that_of_the_written_bytes(report: dict) -> None:
    (record,) = [r for r in report["records"] if r["section"] == "overhead"]
    case = cases.make_case(Shape(*TINY.short[0]))
    ideal = naive_cost(case.logits, case.symbols) / 8 / 4
    assert record["ideal_bytes_per_image"] == pytest.approx(ideal)
    assert record["above_ideal"] == pytest.approx(record["bytes_per_image"] - 2 - ideal)
    assert -0.5 < record["above_ideal"] < 1
    (long,) = [r for r in report["records"] if r["section"] == "long"]
    assert long["symbols"] == TINY.long_symbols
    assert 0 < long["percent_above_intervals"] < 3


def test_tables_show_every_record(report: dict) -> None:
    text = page(report)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    made = tables(report)
    assert sum(len(table.rows) for table in made[1:]) == len(report["records"])
    for table in made:
        assert f"### {table.title}\n\n| " in text
        for row in [table.header, *table.rows]:
            assert len(row) == len(table.header)
            assert [number(value) for value in row] in lines
    assert "percov2 0" in text.splitlines()[0]


def test_columns_are_aligned_and_pages_know_how() -> None:
    table = Table("", ["coder", "ms"], [["percov2", 1.5], ["a", None], ["b", 12]])
    assert table.markdown().splitlines() == [
        "| coder   |   ms |",
        "| :------ | ---: |",
        "| percov2 | 1.50 |",
        "| a       |    - |",
        "| b       |   12 |",
    ]


def test_numbers_have_three_digits() -> None:
    texts = {
        None: "-",
        0.0: "0",
        3.0: "3",
        2: "2",
        1234.5: "1234",
        12.34: "12.3",
        0.01234: "0.0123",
    }
    assert {value: number(value) for value in texts} == texts


# Cases -------------------------------------------------------------------------------------------


def naive_cost(logits: np.ndarray, symbols: np.ndarray) -> float:
    """Bits of all symbols, one by one."""
    bits = 0.0
    for row, symbol in zip(logits.reshape(-1, logits.shape[-1]), symbols.reshape(-1), strict=True):
        p = np.exp(row.astype(np.float64))
        bits -= np.log2(p[symbol] / p.sum())
    return float(bits)


def test_symbols_follow_their_logits() -> None:
    case = cases.make_case(Shape(64, 500, 4))
    p = np.exp(case.logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    entropy_bits = -(p * np.log2(p)).sum()
    cost = naive_cost(case.logits, case.symbols)
    assert cases.ideal_bytes(case.logits, case.symbols).sum() * 8 == pytest.approx(cost)
    assert cost == pytest.approx(entropy_bits, rel=0.03)
    expected = p.sum((0, 1))
    counts = np.bincount(case.symbols.reshape(-1), minlength=64)
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected.max())


def test_cases_repeat_and_differ() -> None:
    a, b = (cases.make_case(Shape(8, 4, 2)) for _ in range(2))
    other = cases.make_case(Shape(8, 4, 2), seed=1)
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.symbols, b.symbols)
    assert not np.array_equal(a.logits, other.logits)
    assert a.first(1).shape == Shape(8, 4, 1)
    np.testing.assert_array_equal(a.first(1).logits, a.logits[:1])


def test_many_images_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coders, "LOGITS_AT_ONCE", 100)
    shape = Shape(8, 6, 5)
    parts = list(coders.parts_of(shape))
    assert [part.shape.images for part in parts] == [2, 2, 1]
    assert not np.array_equal(parts[0].logits, parts[1].logits)
    record = coders.short_streams(shape)
    costs = [naive_cost(part.logits, part.symbols) for part in parts]
    assert record["ideal_bytes_per_image"] == pytest.approx(sum(costs) / 8 / 5)


def test_one_image_has_no_standard_error() -> None:
    record = coders.short_streams(Shape(16, 12, 1))
    assert record["above_ideal_error"] is None
    assert number(record["above_ideal_error"]) == "-"
    case = cases.make_case(Shape(16, 12, 2))
    ideal = cases.ideal_bytes(case.logits, case.symbols)
    lengths = np.rint(ideal).astype(int) + np.array([1, 5])
    record = coders.peer_streams(case, "other", lengths.tolist())
    above = lengths - ideal
    assert record["above_ideal_error"] == pytest.approx(abs(above[1] - above[0]) / 2)


def test_integer_logits_are_the_nearest() -> None:
    logits = cases.make_case(Shape(16, 9, 2)).logits
    integers = cases.integer_logits(logits)
    assert (integers.max(-1) == 0).all()
    exact = (logits - logits.max(-1, keepdims=True)).astype(np.float64) * 256 / np.log(2)
    assert np.abs(integers - exact).max() <= 0.501
    far = np.array([[[0.0, -1e9]]], dtype=np.float32)
    assert cases.integer_logits(far).tolist() == [[[0, -32768]]]


# Nothing wrong is timed --------------------------------------------------------------------------


def test_of_several_rounds_the_middle_one_counts() -> None:
    def round_of(encode: float, decode: float) -> list[dict]:
        times = {"encode": {"median_s": encode}, "decode": {"median_s": decode}}
        return [{"coder": "a", "given": "b", "bytes": 7, **times}]

    rounds = [round_of(3, 1), round_of(1, 2), round_of(2, 9)]
    assert middle(rounds) == round_of(2, 2)
    assert middle(rounds[:2]) == round_of(1, 1)
    with pytest.raises(ValueError, match="same records"):
        middle([round_of(1, 1), [{**round_of(1, 1)[0], "bytes": 8}]])


@pytest.mark.parametrize(
    ("owner", "name", "calls", "message"),
    [
        (
            RansDecoder,
            "decode",
            (
                lambda: coders.timed(cases.make_case(Shape(16, 4, 2)), "int16 logits", SHORT),
                lambda: coders.short_streams(Shape(16, 4, 2)),
                lambda: coders.long_stream(Shape(16, 4, 1), 2, 16),
            ),
            "other symbols",
        ),
        (
            coders.rans,
            "intervals",
            (lambda: coders.timed(cases.make_case(Shape(16, 4, 2)), coders.INTERVALS, SHORT),),
            "intervals differ",
        ),
        (
            model.rans,
            "stage_attention",
            (lambda: model.attention(SMALL, "qlds5", 5, 2, SHORT),),
            "attention",
        ),
    ],
)
def test_wrong_results_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: tuple, message: str
) -> None:
    right = getattr(owner, name)

    def wrong(*arguments: object, **options: object) -> Any:
        result = right(*arguments, **options)
        first = result[0] if isinstance(result, tuple) else result
        first.flat[-1] ^= 1
        return result

    monkeypatch.setattr(owner, name, wrong)
    for call in calls:
        with pytest.raises(coders.Mismatch, match=message):
            call()


def test_measure_does_not_count_the_first_call() -> None:
    calls: list[int] = []
    timing = measure(lambda: calls.append(1), Effort(0.0, 3, 5))
    assert isinstance(timing, Timing)
    assert timing.runs == 3
    assert len(calls) == 4
    assert measure(lambda: None, Effort(60.0, 1, 5)).runs == 5


@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_attention_kernel_equals_the_oracle(name: str) -> None:
    case = model.AttentionCase(SMALL, name, 18, 2)
    result = case.compiled()
    for image in range(2):
        np.testing.assert_array_equal(result[image], case.oracle(image))


def test_attention_refuses_arrays_that_do_not_fit() -> None:
    case = model.AttentionCase(SMALL, "qlds5", 4, 1)
    q, kv, bias = case.q, case.kv, case.bias.numpy()

    good = {"stages": case.stages, "bias": bias, "shift": case.shift.numpy(), "gain": 1}
    good |= {"q": q, "kv": kv}
    for message, change in (
        ("q's second axis", {"q": q[:, 1:].copy()}),
        ("kv's first axis", {"kv": np.repeat(kv, 2, axis=0)}),
        ("kv's second axis", {"kv": kv[:, 1:].copy()}),
        ("kv's last axis", {"kv": kv[:, :, 1:].copy()}),
        ("bias's last axis", {"bias": bias[:, 1:].copy()}),
        ("head_dim", {"q": q[:, :, :-4].copy()}),
        ("gain_bits", {"gain": 9}),
        ("stages", {"stages": case.stages + 1}),
    ):
        with pytest.raises(ValueError, match=message):
            rans.stage_attention(*{**good, **change}.values())


# The float transformer ---------------------------------------------------------------------------


def test_float_transformer_sees_earlier_stages_only() -> None:
    torch.manual_seed(0)
    stages = schedule.stages("qlds5", 4, 5)
    config = TransformerConfig(codebook_size=9, dim=16, heads=2, head_dim=8, layers=3, hidden=32)
    transformer = FloatTransformer(config, stages).eval()
    tokens = torch.randint(0, 9, (2, 4, 5))
    coding = schedule.order(stages)
    stage = stages.reshape(-1)[coding]
    with torch.inference_mode():
        before = transformer(tokens)
        assert before.shape == (2, 20, 9)
        for changed in range(20):
            other = tokens.clone()
            other.view(2, -1)[:, coding[changed]] += 1
            other %= 9
            moved = (transformer(other) - before).abs().amax((0, 2)).numpy() > 1e-6
            np.testing.assert_array_equal(moved, stage > stage[changed])


# Fresh processes ---------------------------------------------------------------------------------


def test_a_fresh_process_reports_memory() -> None:
    record = fresh.memory("decode", MODEL, 4, 8)
    assert record["section"] == "memory"
    assert record["process_s"] > 0
    if fresh.STATUS.exists():
        assert 20 < record["peak_mb"] < 2000
        assert 0 <= record["extra_mb"] < 200


def test_a_failing_process_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"a fresh process failed: .*config\.json"):
        fresh.memory("encode", tmp_path, 1, 4)


# The command line --------------------------------------------------------------------------------


def test_command_writes_table_json_page_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entropy, "QUICK_PLAN", TINY)
    figures, written, folder = tmp_path / "a.json", tmp_path / "a.md", tmp_path / "plots"
    arguments = ["bench", "entropy", "--quick", "--only", "logits,overhead,model", "--json"]
    arguments += [figures, "--markdown", written, "--plots", folder, "--entropy-model", MODEL]
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    report = json.loads(figures.read_text(encoding="utf-8"))
    assert {r["section"] for r in report["records"]} == {"logits", "overhead", "long", "model"}
    assert captured.out == page(report)
    assert written.read_text(encoding="utf-8") == captured.out
    names = {path.name for path in folder.iterdir()}
    assert names == {"throughput.png", "overhead.png", "cost_per_image.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("entropy", "--json", "absent/a.json"), "cannot write absent/a.json"),
        (("entropy", "--markdown", "."), "cannot write ."),
        (
            ("entropy", "--entropy-model", "absent"),
            "absent is no entropy model: it has no config.json",
        ),
        (("entropy", "--instruction-set", "mmx"), "mmx"),
        (("entropy", "--peers", "absent"), "no peers at absent; make them with: bash bench"),
        (("gpu", "--json", "absent/a.json"), "cannot write absent/a.json"),
    ],
)
def test_faults_are_one_line(
    arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failure(capsys, "bench", *arguments, "--quick")
    assert said.startswith(f"percov2: bench {arguments[0]}: ")
    assert text in said


@pytest.mark.parametrize("value", ["", "nothing", "coder,nothing"])
def test_unknown_sections_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("bench", "entropy", "--only", value)
    assert stop.value.code == 2
    assert "must be from coder,logits,overhead,model,attention,cold" in capsys.readouterr().err


ROOT = Path(__file__).parents[2]
REAL_PEERS = ROOT / ".peers" / "bin" / "python"


def fake_interpreter(folder: Path, script: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_failing_peers_say_why(tmp_path: Path) -> None:
    python = fake_interpreter(tmp_path, "echo first >&2; echo no torchac >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"failed: no torchac; .*peers\.sh"):
        Peers(python).versions()
    silent = fake_interpreter(tmp_path, "exit 0")
    with pytest.raises(RuntimeError, match="exit status 0"):
        Peers(silent).versions()


def test_peers_without_their_script_say_so(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    with pytest.raises(RuntimeError, match=r"peer_coders\.py.*make them again"):
        Peers(python).versions()


peer_coders = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "peer_coders.py")))


def pair_of(coder: str, decode: object) -> Any:
    return peer_coders.Peer(
        "logits",
        coder,
        "float32 logits",
        lambda logits, symbols: (logits, symbols),
        lambda tables, symbols: symbols.tobytes(),
        decode,
    )


def test_a_peer_that_decodes_wrongly_is_not_timed() -> None:
    case = cases.make_case(Shape(16, 6, 3))

    def timed(work: Any) -> Timing:
        return measure(work, SHORT)

    right = pair_of("right", lambda tables, stream: np.frombuffer(stream, np.int32))
    record = peer_coders.measure(right, case.logits, case.symbols, timed)
    assert record["stream_bytes"] == [24, 24, 24]
    assert record["encode"]["runs"] == 1
    assert record["encode"]["msym_per_s"] > 0
    untimed = peer_coders.measure(right, case.logits, case.symbols, None)
    assert "encode" not in untimed
    wrong = pair_of("wrong", lambda tables, stream: np.zeros(6, np.int32))
    with pytest.raises(RuntimeError, match="wrong decoded other symbols"):
        peer_coders.measure(wrong, case.logits, case.symbols, timed)


@pytest.mark.skipif(not REAL_PEERS.exists(), reason="benchmarks/peers.sh was not run")
def test_real_peers_are_measured_on_the_same_data() -> None:
    report = entropy.run(TINY, ("coder", "logits", "overhead"), MODEL, Peers(REAL_PEERS))
    assert set(report["peers"]) >= {"constriction", "torchac", "compressai", "torch_ans"}
    names = {(r["coder"], r["given"]) for r in report["records"] if r["section"] == "logits"}
    assert len(names) == 6 + len(coders.LOGITS)
    above = {r["coder"]: r["above_ideal"] for r in report["records"] if r["section"] == "overhead"}
    assert len(above) == 5
    assert all(0 < value < 12 for coder, value in above.items() if coder != coders.NAME)


# The summary -------------------------------------------------------------------------------------


def coded(coder: str, given: str, encode: float, decode: float) -> dict:
    return {
        "section": "logits",
        "coder": coder,
        "given": given,
        "codebook": 256,
        "tokens": 64,
        "images": 2,
        "encode": {"msym_per_s": encode},
        "decode": {"msym_per_s": decode},
    }


def passed(what: str, schedule_name: str, images: int, threads: int, seconds: float) -> dict:
    return {
        "section": "model",
        "what": what,
        "schedule": schedule_name,
        "grid": 16,
        "images": images,
        "threads": threads,
        "median_s": seconds,
        "ms_per_image": seconds / images * 1e3,
    }


def test_summary_compares_with_the_faster_coder() -> None:
    lines = summary.summarize(
        [
            coded("percov2", "int16 logits", 12.0, 6.0),
            coded("constriction Range", "float32 probabilities", 3.0, 1.0),
            coded("constriction ANS", "float32 probabilities", 2.0, 2.0),
            coded("constriction ANS", "float32 logits", 9.0, 9.0),
        ]
    )
    values = {line["name"]: (line["value"], line["goal"], line["met"]) for line in lines}
    assert values == {
        "encode from best prepared input, V=256: x constriction": (4.0, 4.0, True),
        "decode from best prepared input, V=256: x constriction": (3.0, 3.5, False),
    }


def test_summary_of_the_model() -> None:
    lines = summary.summarize(
        [
            passed("float32 torch", "qlds12", 64, 1, 2.0),
            passed("encode", "qlds12", 64, 1, 1.6),
            passed("decode", "qlds12", 64, 1, 3.2),
            passed("encode", "qlds12", 64, 2, 0.8),
            passed("encode", "qlds12", 8, 1, 0.1),
            passed("decode", "raster", 1, 1, 9.0),
            passed("encode", "raster", 1, 1, 0.1),
        ]
    )
    values = {line["name"]: (round(line["value"], 6), line["met"]) for line in lines}
    assert values == {
        "one pass, qlds12, 64 x 16x16: time / float32 torch": (0.8, True),
        "staged decoding, qlds12, 64 x 16x16: time / one pass": (2.0, False),
        "encode, qlds12, 64 x 16x16: 2 threads x 1": (2.0, True),
        "encode, qlds12, 16x16: cost per image, 64 / 8 images": (2.0, False),
    }
