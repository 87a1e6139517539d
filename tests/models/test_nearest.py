"""The nearest-vector kernel: interpreted against torch, and compiled ahead of time for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percov2 import triton_kernels
from tools.command_line import subprocess_run
from tools.compiled_kernels import CAPABILITIES, compile_kernel, launched, needs_triton


@needs_triton
def test_interpreted_kernel_agrees_with_torch():
    script = Path(__file__).parents[1] / "tools" / "interpreted_nearest.py"
    result = subprocess_run(str(script), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "agreed"


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernel_compiles_without_spills(capability):
    source = launched("nearest", torch.ones(20, 32), torch.ones(20, 32))
    report = compile_kernel(source, capability)
    assert report.stack == 0, report  # spilled registers live there
    assert 0 < report.registers <= 255, report
    assert report.shared <= 48 * 1024, report


def test_missing_triton_is_explained_at_the_call(tmp_path):
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('no', name='triton')\n")
    script = tmp_path / "asks.py"  # its folder is the first that is searched
    script.write_text(
        "import torch; from percov2.triton_kernels import nearest_codes\n"
        "nearest_codes(torch.ones(1, 2), torch.ones(3, 2))"
    )
    result = subprocess_run(str(script))
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
def test_wrong_arguments_are_refused(vectors, codebook, message):
    if triton_interprets() and message == "TRITON_INTERPRET":
        pytest.skip("kernels are being interpreted here")
    with pytest.raises(ValueError, match=message):
        triton_kernels.nearest_codes(vectors, codebook)


def triton_interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
