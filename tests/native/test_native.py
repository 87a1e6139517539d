"""Proofs of the compiled core and the CUDA kernels without Python: programs built and run here.

docs/explanation/testing.md says what each of them proves and how to run them longer.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from tools.native_programs import NATIVE, build, run, tools

FUZZ_SECONDS, RACE_SECONDS = 6, 4
SEED = 1
UNITS = re.compile(r"_(avx2|avx512|neon)\.cpp\.o")


def test_hostile_calls_under_sanitizers(request: pytest.FixtureRequest) -> None:
    tools("cmake", "c++")
    said = run(build(request, "native", "fuzz_coder"), str(FUZZ_SECONDS), str(SEED))
    assert "no finding" in said


def test_no_data_races(request: pytest.FixtureRequest) -> None:
    tools("cmake", "c++")
    said = run(build(request, "native", "fuzz_threads"), str(RACE_SECONDS), str(SEED))
    assert "no finding" in said


def test_kernels_agree_with_plain_statements(request: pytest.FixtureRequest) -> None:
    tools("cmake", "c++")
    assert "DIFFER" not in run(build(request, "native", "check_kernels"))
    said = run(build(request, "native", "check_coder"), str(FUZZ_SECONDS), str(SEED))
    assert "no finding" in said


def test_vector_units_share_no_function(request: pytest.FixtureRequest) -> None:
    """A weak function of theirs could be linked into code that runs on every machine."""
    tools("cmake", "c++", "nm")
    library = build(request, "native", "check_kernels").with_name("libcore_of_check_kernels.a")
    symbols = [line.split(":", 2)[1:] for line in run("nm", "-A", library).splitlines()]
    vector = [(unit, rest.split()) for unit, rest in symbols if UNITS.search(unit)]
    kinds = {unit: {words[-2] for name, words in vector if name == unit} for unit, _ in vector}
    assert kinds
    assert not {unit: kind & set("uvwVW") for unit, kind in kinds.items() if kind & set("uvwVW")}


def test_kernels_agree_on_aarch64(request: pytest.FixtureRequest) -> None:
    """NEON kernels, or whatever AArch64 runs, under emulation."""
    tools("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64", required="FAIL_WITHOUT_QEMU")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={NATIVE / 'aarch64.cmake'}"
    folder = "native-aarch64"
    said = run("qemu-aarch64", build(request, folder, "check_kernels", toolchain), "3")
    assert "neon" in said
    assert "DIFFER" not in said
    program = build(request, folder, "check_coder", toolchain)
    assert "no finding" in run("qemu-aarch64", program, str(FUZZ_SECONDS), str(SEED))


def barriers(said: str) -> list[str]:
    """Names of the barriers that the kernels met: what a program prints last."""
    match = re.search(r"(\d+) barriers:(.*)", said)
    assert match
    names = match[2].split()
    assert len(names) == int(match[1]) > 0
    return names


def test_cuda_kernels_agree_with_the_cpu(request: pytest.FixtureRequest) -> None:
    tools("cmake", "c++")
    said = run(build(request, "native", "check_cuda"), "10", "1")
    assert "DIFFER" not in said


def test_cuda_kernels_under_address_sanitizer(request: pytest.FixtureRequest) -> None:
    tools("cmake", "c++")
    said = run(build(request, "native", "check_cuda_memory"), "4", "2")
    assert "DIFFER" not in said


def test_a_deleted_barrier_is_caught(request: pytest.FixtureRequest) -> None:
    """With all barriers there is no race; without any one of them there is."""
    tools("cmake", "c++")
    program = build(request, "native", "check_cuda_races")
    names = barriers(run(program, "1", "3"))
    for number, name in enumerate(names):
        without = subprocess.run(
            [str(program), "1", "3", str(number)], capture_output=True, text=True, check=False
        )
        assert without.returncode != 0, f"nothing happens without the barrier at {name}"
        assert "data race" in without.stderr, f"no race is seen without the barrier at {name}"
