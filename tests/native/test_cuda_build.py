"""The compiled CUDA kernels, and CMake's conditions for building them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from percov2 import _native
from percov2.entropy import rans
from tools import compiled_kernels
from tools.compiled_kernels import kernel_name, module_usages

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "csrc" / "cuda" / "coder_cuda.cu"
ARCHITECTURES = (80, 90, 100)
KERNELS = {"encode_kernel", "pack_kernel", "decode_kernel<true>", "decode_kernel<false>"}


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one architecture: ptxas's report."""

    registers: int
    shared: int
    stack: int
    spilled: int


def usages(report: str) -> dict[tuple[str, int], Usage]:
    """(kernel, architecture) -> usage, from the output of nvcc --resource-usage."""
    found = {}
    parts = re.split(r"Compiling entry function '([^']+)' for 'sm_(\d+)a?'", report)
    for name, architecture, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):

        def number(pattern: str, default: int | None = None, text: str = text) -> int:
            match = re.search(pattern, text)
            if match is None and default is not None:
                return default
            assert match, f"no {pattern!r} in {text!r}"
            return int(match[1])

        found[kernel_name(name), int(architecture)] = Usage(
            registers=number(r"Used (\d+) registers"),
            shared=number(r"(\d+) bytes smem", 0),
            stack=number(r"(\d+) bytes stack frame"),
            spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        )
    return found


def compiled(unit: Path, architectures: tuple[int, ...], folder: Path, *options: str) -> str:
    """nvcc's report on a unit; the tests that need it are skipped where there is no nvcc."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command = ["nvcc", "-std=c++17", "-O3", "-I", str(ROOT / "csrc"), "--resource-usage", *options]
    command += targets
    done = subprocess.run(
        [*command, "-c", str(unit), "-o", str(folder / "unit.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_no_kernel_spills(tmp_path: Path) -> None:
    found = usages(compiled(UNIT, ARCHITECTURES, tmp_path, "--Werror=all-warnings"))
    assert set(found) == {(k, a) for k in KERNELS for a in ARCHITECTURES}
    for (name, architecture), usage in sorted(found.items()):
        print(f"{name:20} sm_{architecture:<4} {usage}")
        assert usage.stack == usage.spilled == 0, (name, architecture, usage)
        # 4 warps of 128 registers still leave room for 4 blocks on a multiprocessor.
        assert usage.registers <= 128 and usage.shared <= 4096, (name, architecture, usage)


SPILLING = """
extern "C" __global__ void encode_kernel(float* data) {
  float kept[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) kept[i] = data[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 32; ++i) data[threadIdx.x + i] = kept[31 - i];
}
"""


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    unit = tmp_path / "spilling.cu"
    unit.write_text(SPILLING)
    usage = usages(compiled(unit, (80,), tmp_path, "-maxrregcount=24"))["encode_kernel", 80]
    assert usage.spilled and usage.stack and usage.registers == 24


def test_the_installed_kernels_do_not_spill() -> None:
    if not rans.cuda_built():
        pytest.skip("the compiled module was built without CUDA")
    found = module_usages(compiled_kernels.cuobjdump("--dump-resource-usage", _native.__file__))
    assert {kernel for kernel, _ in found} == KERNELS
    for name, usage in found.items():
        assert usage.stack == 0 < usage.registers <= 128, (name, usage)


def test_usage_is_read_from_the_report() -> None:
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
    assert module_usages(text) == {
        ("decode_kernel<false>", 80): compiled_kernels.Usage(48, 0, 1024),
        ("decode_kernel<true>", 90): compiled_kernels.Usage(56, 12, 1024),
        ("pack_kernel", 90): compiled_kernels.Usage(32, 0, 64),
    }
    with pytest.raises(ValueError, match="other_kernel"):
        kernel_name("other_kernel")


PROJECT = """cmake_minimum_required(VERSION 3.20)
project(probe LANGUAGES CXX)
include({root}/csrc/cuda/cuda.cmake)
percov2_add_cuda(kernels "${{MODE}}")
if(TARGET kernels)
  message(STATUS "kernels: yes")
else()
  message(STATUS "kernels: no")
endif()
"""


def configured(
    tmp_path: Path, mode: str, with_nvcc: bool, version: str = "0.2.0"
) -> subprocess.CompletedProcess[str]:
    """CMake's answer in a project with nothing but csrc/cuda/cuda.cmake."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH")}
    if not with_nvcc:
        folders = environment["PATH"].split(os.pathsep)
        kept = [f for f in folders if not (Path(f) / "nvcc").exists()]
        environment["PATH"] = os.pathsep.join(kept)
    for tool in ("cmake", "c++", *(["nvcc"] if with_nvcc else [])):
        if shutil.which(tool, path=environment["PATH"]) is None:
            pytest.skip(f"needs {tool}")
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(root=ROOT))
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment["PATH"]) else []
    return subprocess.run(
        [
            *["cmake", "-S", tmp_path, "-B", tmp_path / "b", *generator],
            *[f"-DMODE={mode}", f"-DSKBUILD_PROJECT_VERSION_FULL={version}"],
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize("mode", ["AUTO", "OFF"])
def test_a_build_without_nvcc_has_no_kernels(tmp_path: Path, mode: str) -> None:
    done = configured(tmp_path, mode, with_nvcc=False)
    assert done.returncode == 0, done.stderr
    assert "kernels: no" in done.stdout


def test_on_fails_loudly_without_nvcc(tmp_path: Path) -> None:
    done = configured(tmp_path, "ON", with_nvcc=False)
    assert done.returncode != 0
    assert "PERCOV2_CUDA is ON, but no CUDA compiler was found" in done.stderr


def test_another_mode_is_refused(tmp_path: Path) -> None:
    done = configured(tmp_path, "YES", with_nvcc=False)
    assert done.returncode != 0
    assert "it must be ON, OFF or AUTO" in done.stderr


@pytest.mark.parametrize("mode", ["AUTO", "OFF"])
def test_a_build_with_nvcc(tmp_path: Path, mode: str) -> None:
    done = configured(tmp_path, mode, with_nvcc=True)
    assert done.returncode == 0, done.stderr
    assert f"kernels: {'yes' if mode == 'AUTO' else 'no'}" in done.stdout
    assert ("CUDA compiler" in done.stdout) == (mode == "AUTO")


def test_a_labelled_wheel_holds_what_its_label_says(tmp_path: Path) -> None:
    """A wheel of version 0.2.0+cu130 without kernels, or with those of another release, is none."""
    done = configured(tmp_path, "OFF", with_nvcc=False, version="0.2.0+cu130")
    assert done.returncode != 0
    assert "promises CUDA kernels of nvcc's release 130, but this build has ''" in " ".join(
        done.stderr.split()
    )


def test_a_label_is_held_to_the_release_of_nvcc(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    assert release
    right = configured(tmp_path, "ON", with_nvcc=True, version=f"0.2.0+cu{release[1]}{release[2]}")
    assert right.returncode == 0, right.stderr
    wrong = configured(tmp_path, "ON", with_nvcc=True, version=f"0.2.0+cu{release[1]}99")
    assert wrong.returncode != 0 and "promises CUDA kernels" in wrong.stderr
