"""``percov2 bench gpu`` with emulated kernels, compared with the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from percov2.bench import gpu, gpu_device
from percov2.bench.gpu_jobs import Size
from percov2.bench.timing import Effort
from percov2.entropy.transformer_config import TransformerConfig
from tools import emulated_cuda
from tools.command_line import run
from tools.compiled_kernels import needs_triton

SHORT = Effort(0.0, 1, 1)
SMALL = Size(2, 4, TransformerConfig(codebook_size=16, dim=32, heads=1, layers=2, hidden=64))
PLAN = gpu.Plan((SMALL,), SHORT, SHORT)
COPIED = "a copy within the device"


# The device --------------------------------------------------------------------------------------


class Clock(gpu_device.Gpu):
    """A device on which every call takes a second longer than the one before it."""

    def find(self) -> torch.device:
        return torch.device("cpu")

    def ask(self) -> Any:
        self.now, self.waits, self.log = 0.0, 0, []
        return SimpleNamespace(L2_cache_size=1, name="NVIDIA H200")

    def mark(self) -> Any:
        return self.now

    def seconds(self, begin: Any, end: Any) -> float:
        return end - begin

    def wait(self) -> None:
        self.waits += 1

    def work(self) -> None:
        self.log.append("work")
        self.now += len([x for x in self.log if x == "work"])


def test_times_are_the_devices_and_leave_out_what_comes_before() -> None:
    clock = Clock()
    timing = clock.time(clock.work, Effort(0.0, 3, 9), lambda: clock.log.append("before"))
    assert clock.log == ["before", "work"] * (gpu_device.WARM_UP + 3)
    assert (timing.median_s, timing.best_s, timing.runs) == (5.0, 4.0, 3)
    assert clock.waits == 2
    assert Clock().time(lambda: None, Effort(9.0, 3, 7)).runs == 9  # whole rounds


@pytest.mark.parametrize(
    ("told", "peak", "source"),
    [
        ({"name": "NVIDIA H200"}, 4.8e12, "its data sheet"),
        (
            {"name": "New", "memory_clock_rate": 2619000, "memory_bus_width": 5120},
            3.352e12,
            "the device's memory clock and bus",
        ),
        ({"name": "New"}, None, COPIED),
    ],
)
def test_the_peak_is_told_or_known_or_copied(told: dict, peak: float | None, source: str) -> None:
    clock = Clock()
    clock.mark = lambda: clock.work() or clock.now  # every call takes some time
    clock.properties = SimpleNamespace(**told)
    found = clock.bandwidth(SHORT)
    assert (found["card"], found["peak_from"]) == (told["name"], source)
    assert found["peak_bytes_per_s"] == pytest.approx(peak or found["copy_bytes_per_s"], rel=1e-3)
    assert found["copy_bytes_per_s"] > 0


def test_launches_are_counted_in_a_trace() -> None:
    names = ["Memcpy HtoD (Pageable -> Device)", "int_linear_kernel", "void at::add<int>()"]
    names += ["int_linear_kernel", "intervals_kernel", "void percov2::encode_kernel(...)"]
    names += ["pack_kernel", "Memset (Device)", "Memcpy DtoH (Device -> Pageable)"]
    found = gpu_device.launches(names)
    after = ["intervals_kernel", "void percov2::encode_kernel(...)", "pack_kernel"]
    assert found == {
        "kernels": 7,
        "after_transformer": [*after, "Memset (Device)"],
        "to_host": 1,
        "to_device": 1,
    }
    assert gpu_device.launches([])["after_transformer"] == []


# Measured without a card -------------------------------------------------------------------------


def emulation(request: pytest.FixtureRequest, *changed: str) -> subprocess.CompletedProcess[str]:
    """The benchmark as on a card: tests/tools/measure_emulated.py."""
    module = emulated_cuda.module(request, "emulated_cuda")
    script = Path(__file__).parents[1] / "tools" / "measure_emulated.py"
    return subprocess.run(
        [sys.executable, str(script), str(module.__file__), *changed],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_triton
def test_what_a_card_runs_runs_here(request: pytest.FixtureRequest) -> None:
    done = emulation(request)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    report = answer["report"]
    assert report["kind"] == "measurement"
    sections: dict[str, list[dict]] = {}
    for record in report["records"]:
        assert record["kind"] == "measurement"
        sections.setdefault(record["section"], []).append(record)
    # Every kernel, its case and the bytes of its operands: 4 tokens of one image.
    assert [(r["kernel"], r["case"], r["bytes"]) for r in sections["measured"]] == [
        ("symbol_intervals", "V = 16", 4 * (2 * 16 + 12)),
        ("encode_kernel + pack_kernel", "V = 16", 4 * 8 + 3 * 4 * 4 / 8),
        ("decode_kernel<true>", "V = 16", 4 * (2 * 16 + 4) + 4 * 4 / 8),
        ("decode_kernel<false>", "V = 16", 4 * (2 * 16 + 4) + 4 * 4 / 8),
        ("layer_norm", "d = 24", 4 * 5 * 24),
        ("linear", "q, 24 -> 32, int8", 4 * (24 + 32) + 32 * (24 + 9)),
        ("linear", "kv, 24 -> 64, int8", 4 * (24 + 64) + 64 * (24 + 9)),
        ("linear", "out, 32 -> 24, residual", 4 * (32 + 8 * 24) + 24 * (32 + 9)),
        ("linear", "up, 24 -> 40, table", 4 * (24 + 40) + 40 * (24 + 9)),
        ("linear", "down, 40 -> 24, residual", 4 * (40 + 8 * 24) + 24 * (40 + 9)),
        ("linear", "head, 24 -> 16, int16", 4 * (24 + 2 * 16) + 16 * (24 + 9)),
        ("attention", "1 heads of 32, qlds12", 2 * 32 * (10 + 6) + 4 * 32 * 64),
        ("nearest_codes", "16 codes of 32", 4 * (4 * 32 + 4) + 4 * 32 * 16),
    ]
    for r in sections["measured"]:
        assert r["gpu"]["median_s"] > 0
        assert r["share_of_peak"] == pytest.approx(r["bytes"] / r["gpu"]["median_s"] / 3.35e12)
        assert r["launches"] == len(r["kernel"].split(" + "))
        coder = "V = " in r["case"]
        assert (r["cpu"] is not None) == (coder or r["kernel"] == "attention")
        assert (r["unfused"] is not None) == (r["kernel"] == "symbol_intervals")
    (bandwidth,) = sections["bandwidth"]
    assert (bandwidth["peak_bytes_per_s"], bandwidth["peak_from"]) == (3.35e12, "its data sheet")
    paths = {(r["what"], r["coder"], r["launches"] is None): r for r in sections["paths"]}
    assert len(paths) == len(sections["paths"]) == 6
    encoded = paths["encode", "cuda", False]["launches"]
    assert encoded["after_transformer"] == ["intervals_kernel", "encode_kernel", "pack_kernel"]
    assert encoded["to_host"] == 1
    # Contents and queries pass both layers together. The biases are those of an earlier call.
    norms, maps, attended = 2 * 2 + 1, 2 * 4 + 1, 2
    assert encoded["kernels"] == norms + maps + attended + 3
    assert [line["value"] for line in report["summary"][1:]] == [3, 1]
    assert report["summary"][0]["value"] == pytest.approx((2 * 16 + 12) / (2 * 16 + 6))
    for title in ("Measured, after", "Whole coding, random weights", "GB/s, from its data sheet"):
        assert title in answer["text"]
    assert "| `decode_kernel<true>` " in answer["text"]


@needs_triton
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("intervals", "symbol_intervals (V = 16): the results of the GPU and the CPU differ"),
        ("tokens", "the tokens differ from those of the CPU"),
    ],
)
def test_a_mismatch_ends_the_benchmark(
    request: pytest.FixtureRequest, changed: str, message: str
) -> None:
    done = emulation(request, changed)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.cuda
@needs_triton
def test_a_card_is_measured() -> None:
    size = Size(4, 8, TransformerConfig(layers=2))
    report = gpu.run(gpu.Plan((size,), SHORT, SHORT), gpu.find())
    assert report["kind"] == "measurement"
    assert {line["met"] for line in report["summary"]} == {True}
    for r in report["records"]:
        if r["section"] == "measured":
            assert r["launches"] >= len(r["kernel"].split(" + "))


# The command line --------------------------------------------------------------------------------


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find", lambda: None)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.rans, "cuda_built", lambda: False)
    figures, page = tmp_path / "a.json", tmp_path / "a.md"
    assert run("bench", "gpu", "--quick", "--json", figures, "--markdown", page) == 0
    out = capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == out
    report = json.loads(figures.read_text(encoding="utf-8"))
    assert (report["kind"], report["summary"]) == ("missing", [])
    assert {r["kind"] for r in report["records"]} == {"missing"}
    for why in ("no CUDA device", "pip install 'percov2[gpu]'", "-C cmake.define.PERCOV2_CUDA=ON"):
        assert sum(why in r["why"] for r in report["records"]) == 1
        assert out.count(why) == 1


def test_a_card_without_triton_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.rans, "cuda_built", lambda: True)
    monkeypatch.setattr(gpu.rans, "cuda_devices", lambda: ())
    report = gpu.run(PLAN, Clock())
    assert [r["why"] for r in report["records"]] == [gpu.NO_TRITON]
