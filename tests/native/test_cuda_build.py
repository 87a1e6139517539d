"""The compiled CUDA kernels, and CMake's conditions for building them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from percov2 import _native
from percov2.entropy import rans
from tools import compiled_kernels
from tools.compiled_kernels import Usage, kernel_name, module_usages
from tools.native_programs import run, tools

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "csrc" / "cuda" / "coder_cuda.cu"
ARCHITECTURES = (80, 90, 100)
KERNELS = {"encode_kernel", "pack_kernel", "decode_kernel<true>", "decode_kernel<false>"}


def compiled(
    unit: Path, architectures: tuple[int, ...], folder: Path, *options: str
) -> dict[tuple[str, int], Usage]:
    """What nvcc makes of a unit; the tests that need it are skipped where there is no nvcc."""
    tools("nvcc")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    made = folder / "unit.o"
    run(
        "nvcc", "-std=c++17", "-O3", "-I", ROOT / "csrc", *options, *targets, "-c", unit, "-o", made
    )
    return module_usages(compiled_kernels.cuobjdump("--dump-resource-usage", str(made)))


def test_no_kernel_spills(tmp_path: Path) -> None:
    found = compiled(UNIT, ARCHITECTURES, tmp_path, "--Werror=all-warnings")
    assert set(found) == {(k, a) for k in KERNELS for a in ARCHITECTURES}
    for named, usage in found.items():
        # 4 warps of 128 registers still leave room for 4 blocks on a multiprocessor.
        assert usage.stack == 0 < usage.registers <= 128 and usage.shared <= 4096, (named, usage)


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
    usage = compiled(unit, (80,), tmp_path, "-maxrregcount=24")["encode_kernel", 80]
    assert usage.stack and usage.registers == 24


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
        ("decode_kernel<false>", 80): Usage(48, 0, 1024),
        ("decode_kernel<true>", 90): Usage(56, 12, 1024),
        ("pack_kernel", 90): Usage(32, 0, 64),
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


@pytest.mark.parametrize(
    ("mode", "version", "message"),
    [
        ("AUTO", "0.1.0", None),
        ("OFF", "0.1.0", None),
        ("ON", "0.1.0", "PERCOV2_CUDA is ON, but no CUDA compiler was found"),
        ("YES", "0.1.0", "it must be ON, OFF or AUTO"),
        # A labelled wheel without kernels, or with those of another release, is none.
        ("OFF", "0.1.0+cu130", "CUDA kernels of nvcc's release 130, but this build has ''"),
    ],
)
def test_a_build_without_nvcc(tmp_path: Path, mode: str, version: str, message: str | None) -> None:
    done = configured(tmp_path, mode, with_nvcc=False, version=version)
    if message is None:
        assert done.returncode == 0, done.stderr
        assert "kernels: no" in done.stdout
    else:
        assert done.returncode != 0
        assert message in " ".join(done.stderr.split())


def test_a_build_with_nvcc_has_the_kernels_that_its_label_names(tmp_path: Path) -> None:
    tools("nvcc")
    release = re.search(r"release (\d+)\.(\d+)", run("nvcc", "--version"))
    assert release
    label = f"0.1.0+cu{release[1]}"
    right = configured(tmp_path, "AUTO", with_nvcc=True, version=label + release[2])
    assert right.returncode == 0, right.stderr
    assert "kernels: yes" in right.stdout and "CUDA compiler" in right.stdout
    wrong = configured(tmp_path, "ON", with_nvcc=True, version=label + "99")
    assert wrong.returncode != 0 and "promises CUDA kernels" in wrong.stderr
    (tmp_path / "off").mkdir()
    off = configured(tmp_path / "off", "OFF", with_nvcc=True)
    assert off.returncode == 0, off.stderr
    assert "kernels: no" in off.stdout and "CUDA compiler" not in off.stdout
