"""The nearest-vector kernel: interpreted against torch, and compiled ahead of time for GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from percov2 import triton_kernels

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_triton
def test_interpreted_kernel_agrees_with_torch() -> None:
    result = run(str(HERE / "interpreted_nearest.py"), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "agreed"


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernel_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from percov2.triton_kernels import nearest

    signature = {
        "vectors": "*fp32",
        "codebook": "*fp32",
        "indices": "*i32",
        "rows": "i32",
        "codes": "i32",
        "dim": "i32",
        "BLOCK_N": "constexpr",
        "BLOCK_K": "constexpr",
        "BLOCK_D": "constexpr",
    }
    blocks = {(6,): nearest.BLOCK_N, (7,): nearest.BLOCK_K, (8,): nearest.BLOCK_D}
    # What a launch with allocator-aligned tensors and D = 32 would claim.
    divisible = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 5)}
    source = ASTSource(nearest.nearest_kernel, signature, constexprs=blocks, attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    cubin = tmp_path / "nearest.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [str(tool), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    usage = {
        key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)
    }
    assert usage["STACK"] == usage["LOCAL"] == 0, report  # spilled registers live there
    assert 0 < usage["REG"] <= 255, report
    assert compiled.metadata.shared <= 48 * 1024, compiled.metadata.shared


def test_missing_triton_is_explained_at_the_call(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('no', name='triton')\n")
    code = (
        "import torch; from percov2.triton_kernels import nearest_codes\n"
        "nearest_codes(torch.ones(1, 2), torch.ones(3, 2))"
    )
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = run("-c", code, PYTHONPATH=search)
    assert result.returncode == 1
    assert "RuntimeError" in result.stderr
    assert "pip install 'percov2[gpu]'" in result.stderr


@needs_triton
@pytest.mark.parametrize(
    ("vectors", "codebook", "message"),
    [
        (torch.ones(2), torch.ones(3, 2), "two axes"),
        (torch.ones(2, 2).double(), torch.ones(3, 2), "float64"),
        (torch.ones(2, 2), torch.ones(3, 4), "2 components"),
        (torch.ones(2, 2), torch.ones(0, 2), "empty"),
        (torch.ones(2, 2), torch.ones(3, 2, device="meta"), "meta"),
        (torch.ones(2, 2), torch.ones(3, 2), "TRITON_INTERPRET"),
    ],
)
def test_wrong_arguments_are_refused(
    vectors: torch.Tensor, codebook: torch.Tensor, message: str
) -> None:
    if triton_interprets() and message == "TRITON_INTERPRET":
        pytest.skip("kernels are being interpreted here")
    with pytest.raises(ValueError, match=message):
        triton_kernels.nearest_codes(vectors, codebook)


def triton_interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
