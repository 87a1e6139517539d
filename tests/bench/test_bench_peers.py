"""The peers in the benchmark, and the summary of their figures."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from percov2.bench import cases, coders, entropy, summary
from percov2.bench.cases import Shape
from percov2.bench.peers import Peers
from percov2.bench.timing import Timing, measure
from tools.tiny_plan import MODEL, SHORT, TINY

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
    assert set(report["peers"]) >= {"constriction", "torchac", "compressai"}
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
