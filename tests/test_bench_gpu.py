"""``percov2 bench gpu``: predictions hold together, and what a card would run runs here."""

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

import emulated_cuda
from compiled_kernels import needs_triton
from percov2 import cli
from percov2.bench import (
    gpu,
    gpu_compiled,
    gpu_device,
    gpu_kernels,
    gpu_plan,
    gpu_predict,
    gpu_summary,
    gpu_tables,
)
from percov2.bench.gpu_cards import CARDS, Card, occupancy
from percov2.bench.gpu_compiled import Missing, instructions
from percov2.bench.gpu_kernels import Kernel, Size
from percov2.bench.timing import Effort
from percov2.entropy.transformer_config import TransformerConfig

H100 = next(card for card in CARDS if card.name.startswith("H100"))
SHORT = Effort(0.0, 1, 1)
SMALL = Size(2, 16, TransformerConfig(codebook_size=16, dim=32, heads=1, layers=2, hidden=64))


# Counting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "shared", "grid", "expected"),
    [
        # CUDA's occupancy calculator for blocks of 4 warps: 65,536 registers, 64 warps, 32 blocks.
        (32, 0, 10**6, (64, "warps")),
        (72, 0, 10**6, (28, "registers")),
        (128, 0, 10**6, (16, "registers")),
        (255, 0, 10**6, (8, "registers")),
        (32, 48 * 1024, 10**6, (16, "shared memory")),
        (32, 0, 132, (4, "grid")),
        (32, 0, 133, (8, "grid")),
    ],
)
def test_occupancy(registers: int, shared: int, grid: int, expected: tuple[int, str]) -> None:
    found = occupancy(H100, 4, registers, shared, grid)
    assert (found.warps, found.limit) == expected


def test_occupancy_by_blocks() -> None:
    assert occupancy(H100, 1, 16, 0, 10**6).limit == "blocks"


def machine(*lines: str) -> str:
    """Machine code as cuobjdump prints it; a line's number is its address in sixteens."""
    return "".join(f"        /*{16 * i:04x}*/  {line} ;\n" for i, line in enumerate(lines))


def test_instructions_are_counted_once_and_loops_as_often_as_they_run() -> None:
    body = ["IADD3 R1, R1, R2, RZ"] * 40
    inner = [*body, "@P0 BRA 0x20"]
    code = machine("MOV R1, RZ", "MOV R2, RZ", *inner, "@P1 EXIT", "EXIT", *body, "BRA 0x20")
    assert instructions(code, (7,)) == 2 + 7 * 41 + 2
    outer = machine("MOV R1, RZ", "NOP", *inner, "@!P1 BRA 0x10", "EXIT")
    assert instructions(outer, (3, 3 * 7)) == 1 + 3 * 2 + 3 * 7 * 41 + 1
    # A short loop waits; it runs once.
    assert instructions(machine("NOP", "@P0 BRA 0x0", "EXIT")) == 3
    for trips in ((), (7, 7)):
        with pytest.raises(ValueError, match="has 1 loops"):
            instructions(code, trips)


def test_usage_is_read_from_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_ZN7percov2{}EvNS_10DecodeTaskE"
    line = "REG:{} STACK:{} SHARED:{} LOCAL:{} CONSTANT[0]:448 TEXTURE:0"
    text = "".join(
        f"Fatbin elf code:\n====\narch = sm_{arch}\ncode version = [1,8]\n\nResource usage:\n"
        f" Common:\n  GLOBAL:0 CONSTANT[3]:1024\n Function {name.format(symbol)}:\n  {usage}\n"
        for arch, symbol, usage in (
            (80, "13decode_kernelILb0E", line.format(48, 0, 1024, 0)),
            (90, "13decode_kernelILb1E", line.format(56, 8, 2048, 4)),
            (90, "11pack_kernel", line.format(32, 0, 1088, 0)),
        )
    )
    monkeypatch.setattr(gpu_compiled, "_cuobjdump", lambda *arguments: text)
    assert gpu_compiled.module_usages(Path("module.so")) == {
        ("decode_kernel<false>", 80): gpu_compiled.Usage(48, 0, 1024),
        ("decode_kernel<true>", 90): gpu_compiled.Usage(56, 12, 1024),
        ("pack_kernel", 90): gpu_compiled.Usage(32, 0, 64),
    }
    with pytest.raises(ValueError, match="other_kernel"):
        gpu_compiled.kernel_name("other_kernel")


@pytest.mark.parametrize(("capability", "code"), [(80, 80), (86, 80), (90, 90), (103, 100)])
def test_a_card_runs_the_newest_code_that_it_can(capability: int, code: int) -> None:
    assert gpu_compiled.code_for(capability, {80, 90, 100}) == code


def test_a_card_without_code_is_explained() -> None:
    with pytest.raises(Missing, match=r"sm_120 runs its PTX.*CMAKE_CUDA_ARCHITECTURES=120-real"):
        gpu_compiled.code_for(120, {80, 90, 100})


def test_the_longest_of_the_limits_is_the_time() -> None:
    card = Card("card", 90, 10, 1e9, 1e9, 1e12)
    kernel = Kernel(1000, 4, 5e6, chain_cycles=4e6, lookup_cycles=2e7, tensor_ops=1e9)
    assert gpu_predict.times(kernel, card, 1.2e8) == {
        "bandwidth": 5e-3,
        "chain": 4e-3,
        "lookups": 2e-3,
        "tensor cores": 1e-3,
        "issue": 3e-3,
    }
    # Two warps use two schedulers, not forty.
    few = Kernel(1, 2, 0.0)
    assert gpu_predict.times(few, card, 1.2e8) == {"issue": 6e-2}


# Predictions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> dict:
    """The predictions for one card at a small size."""
    plan = gpu_plan.GpuPlan((H100,), (SMALL,), SHORT, SHORT)
    return gpu.run(plan)


@needs_triton
def test_every_kernel_is_predicted_and_says_so(report: dict) -> None:
    assert json.loads(json.dumps(report)) == report
    assert report["kind"] == "prediction"
    kernels = [r for r in report["records"] if r["section"] == "kernels"]
    names = {r["kernel"] for r in kernels}
    triton = {"symbol_intervals", "layer_norm", "linear", "attention", "nearest_codes"}
    cuda = {"encode_kernel", "pack_kernel", "decode_kernel<true>", "decode_kernel<false>"}
    assert names == triton | cuda
    for r in kernels:
        if r["kernel"] in triton:
            assert r["kind"] == "prediction"
        if r["kind"] == "missing":
            assert "-C cmake.define.PERCOV2_CUDA=ON" in r["why"]
            continue
        assert r["stack_bytes"] == 0 < r["registers"] <= 255
        assert 0 < r["resident_warps"] <= 64
        assert r["predicted_s"] == max(r["limits_s"].values())
        assert r["limits_s"][r["predicted_limit"]] == r["predicted_s"]
        assert r["predicted_s"] >= r["bytes"] / H100.bandwidth > 0


def test_the_floors_are_met() -> None:
    sizes = gpu_plan.FULL_PLAN.sizes
    counted = [gpu_summary.launches(size) for size in sizes]
    lines = gpu_summary.summarize(sizes, counted)
    assert len(lines) == 6
    assert all(line["met"] for line in lines)
    assert lines[0]["value"] == pytest.approx((2 * 256 + 12) / (2 * 256 + 6))


def test_traffic_is_that_of_the_operands() -> None:
    config = SMALL.config
    assert gpu_kernels.interval_bytes(SMALL) == (32 * (32 + 12), 32 * (32 + 6))
    assert gpu_kernels.encode(SMALL).bytes == 32 * (8 + 4 / 8)
    assert gpu_kernels.decode(SMALL, True).bytes == 32 * (32 + 4 + 4 / 8)
    maps = gpu_kernels.linear_maps(config)
    assert maps[4] == ("down", 64, 32, "residual")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise Missing(gpu_compiled.HOW_TO_GET_TRITON)

    def absent() -> dict:
        raise Missing(gpu_compiled.HOW_TO_GET_CUDA)

    monkeypatch.setattr(gpu_compiled, "require_triton", missing)
    monkeypatch.setattr(gpu_compiled, "installed_usages", absent)
    plan = gpu_plan.GpuPlan((H100,), (SMALL,), SHORT, SHORT)
    report = gpu.run(plan)
    kernels = [r for r in report["records"] if r["section"] == "kernels"]
    assert {r["kind"] for r in kernels} == {"missing"}
    assert {r["why"] for r in kernels} == {
        gpu_compiled.HOW_TO_GET_TRITON,
        gpu_compiled.HOW_TO_GET_CUDA,
    }
    text = gpu_tables.as_text(report)
    assert text.count("pip install 'percov2[gpu]'") == sum("triton" in r["why"] for r in kernels)


@needs_triton
def test_encoding_is_predicted_as_the_sum_of_its_launches(report: dict) -> None:
    kernels = [dict(r) for r in report["records"] if r["section"] == "kernels"]
    for i, r in enumerate(kernels):
        r.update(kind="prediction", predicted_s=float(2**i))
    (whole,) = gpu_summary.whole(SMALL, kernels)
    by_name = {(r["kernel"], r["case"].partition(",")[0]): r["predicted_s"] for r in kernels}
    # Two layers, of which queries pass through both and contents through one.
    assert whole["parts_s"]["layer_norm"] == (2 + 2 * 3 + 1) * by_name["layer_norm", "d = 32"]
    assert whole["parts_s"]["kv"] == 2 * by_name["linear", "kv"]
    assert whole["parts_s"]["down"] == 3 * by_name["linear", "down"]
    assert whole["parts_s"]["attention"] == 1.5 * by_name["attention", "1 heads of 32"]
    assert whole["predicted_s"] == sum(whole["parts_s"].values())
    assert len(whole["parts_s"]) == 11
    kernels[0].pop("predicted_s")
    assert gpu_summary.whole(SMALL, kernels) == []


# On a card ---------------------------------------------------------------------------------------


class Clock(gpu_device.Gpu):
    """A device on which every call takes a second longer than the one before it."""

    def find(self) -> torch.device:
        return torch.device("cpu")

    def ask(self) -> Any:
        self.now, self.waits, self.log = 0.0, 0, []
        return SimpleNamespace(L2_cache_size=1, name="H200", major=9, minor=0, **PROPERTIES)

    def mark(self) -> Any:
        return self.now

    def seconds(self, begin: Any, end: Any) -> float:
        return end - begin

    def wait(self) -> None:
        self.waits += 1

    def work(self) -> None:
        self.log.append("work")
        self.now += len([x for x in self.log if x == "work"])


PROPERTIES = {
    "multi_processor_count": 132,
    "max_threads_per_multi_processor": 2048,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_multiprocessor": 233472,
}


def test_times_are_the_devices_and_leave_out_what_comes_before() -> None:
    clock = Clock()
    timing = clock.time(clock.work, Effort(0.0, 3, 9), lambda: clock.log.append("before"))
    assert clock.log == ["before", "work"] * (gpu_device.WARM_UP + 3)
    assert (timing.median_s, timing.best_s, timing.runs) == (5.0, 4.0, 3)
    assert clock.waits == 2
    assert Clock().time(lambda: None, Effort(9.0, 3, 7)).runs == 9  # whole rounds


def test_a_card_is_what_it_tells_of_itself() -> None:
    clock = Clock()
    card = clock.card()
    assert (card.name, card.capability, card.bandwidth) == ("H200", 90, 4.8e12)
    assert (card.multiprocessors, card.warps, card.shared) == (132, 64, 228 * 1024)
    told = {"clock_rate": 1980000, "memory_clock_rate": 2619000, "memory_bus_width": 5120}
    clock.properties = SimpleNamespace(name="New", major=8, minor=9, **told, **PROPERTIES)
    card = clock.card()
    assert (card.capability, card.blocks, card.clock_hz) == (89, 24, 1.98e9)
    assert card.bandwidth == pytest.approx(3.352e12, rel=1e-3)
    # What it does not tell limits nothing.
    clock.properties = SimpleNamespace(name="New", major=12, minor=0, **PROPERTIES)
    kernel = Kernel(1, 1, 1.0, chain_cycles=1.0, tensor_ops=1.0)
    assert gpu_predict.times(kernel, clock.card(), 1.0) == {}


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


def emulation(request: pytest.FixtureRequest, *changed: str) -> subprocess.CompletedProcess[str]:
    """The benchmark as on a card: tests/measure_emulated.py."""
    module = emulated_cuda.module(request, "emulated_cuda")
    script = Path(__file__).parent / "measure_emulated.py"
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
        sections.setdefault(record["section"], []).append(record)
    # Every row of the predictions is measured, and nothing else.
    measured = sections["measured"]
    rows = [(n, r["case"]) for r in measured for n in r["kernel"].split(" + ")]
    assert rows == [(r["kernel"], r["case"]) for r in sections["kernels"]]
    for r in measured:
        assert r["kind"] == "measurement"
        assert r["gpu"]["median_s"] > 0
        assert r["share_of_peak"] == pytest.approx(r["bytes"] / r["gpu"]["median_s"] / 3.35e12)
        assert r["launches"] == len(r["kernel"].split(" + "))
        coder = "V = " in r["case"]
        assert (r["cpu"] is not None) == (coder or r["kernel"] == "attention")
        assert (r["unfused"] is not None) == (r["kernel"] == "symbol_intervals")
        assert (r["predicted_s"] is not None) == ("_kernel" in r["kernel"])
    (bandwidth,) = sections["bandwidth"]
    assert (bandwidth["peak_bytes_per_s"], bandwidth["peak_from"]) == (3.35e12, "its data sheet")
    # The code queues what the predictions count.
    paths = {(r["what"], r["coder"], r["launches"] is None): r for r in sections["paths"]}
    assert len(paths) == len(sections["paths"]) == 6
    encoded = paths["encode", "cuda", False]["launches"]
    assert encoded["after_transformer"] == ["intervals_kernel", "encode_kernel", "pack_kernel"]
    assert encoded["to_host"] == 1
    (counted,) = sections["launches"]
    assert len(counted["after_transformer"]) == 3
    assert encoded["kernels"] == 3 + sum(counted["layers_and_head"].values())
    assert [line["value"] for line in report["summary"][1:]] == [3, 1]
    for title in ("Measured, after", "Whole coding, random weights", "GB/s by its data sheet"):
        assert title in answer["text"]


@needs_triton
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("intervals", "symbol_intervals (V = 16) does not return what the CPU returns"),
        ("tokens", "other tokens than on the CPU"),
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
    config = TransformerConfig(layers=2)
    report = gpu.run(gpu_plan.GpuPlan((), (Size(4, 64, config),), SHORT, SHORT), gpu.find())
    assert report["kind"] == "measurement"
    assert {line["met"] for line in report["summary"]} == {True}
    for r in report["records"]:
        if r["section"] == "measured":
            assert r["launches"] >= len(r["kernel"].split(" + "))


# The command line --------------------------------------------------------------------------------


@needs_triton
def test_command_writes_tables_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = gpu_plan.GpuPlan((H100,), (SMALL,), SHORT, SHORT)
    monkeypatch.setattr(gpu_plan, "QUICK_PLAN", plan)
    figures, page = tmp_path / "a.json", tmp_path / "a.md"
    arguments = ["bench", "gpu", "--quick", "--json", str(figures), "--markdown", str(page)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "PREDICTION: no CUDA device was found" in out
    assert "PREDICTION for H100 SXM" in out
    written = page.read_text(encoding="utf-8")
    assert "### PREDICTION for H100 SXM" in written
    assert "| `decode_kernel<true>` | V = 16 |" in written
    assert json.loads(figures.read_text(encoding="utf-8"))["kind"] == "prediction"


def test_faults_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "gpu", "--json", "absent/a.json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("percov2: bench gpu: cannot write absent/a.json")
    assert captured.err.count("\n") == 1
