"""The CUDA kernels on the CPU: programs of tests/native that emulate CUDA's threads.

docs/explanation/testing.md says what the emulation is and what it proves.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from tools.native_programs import build, run, tools


def barriers(said: str) -> list[str]:
    """Names of the barriers that the kernels met: what a program prints last."""
    match = re.search(r"(\d+) barriers:(.*)", said)
    assert match
    names = match[2].split()
    assert len(names) == int(match[1]) > 0
    return names


def test_kernels_agree_with_the_cpu(request: pytest.FixtureRequest) -> None:
    tools("cmake", "c++")
    said = run(build(request, "native", "check_cuda"), "10", "1")
    assert "DIFFER" not in said


def test_kernels_under_address_sanitizer(request: pytest.FixtureRequest) -> None:
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
