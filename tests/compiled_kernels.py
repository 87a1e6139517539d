"""Triton kernels without a GPU: interpreted, or compiled ahead of time and reported on."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (80, 90, 100)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def compare_on(device: str, script: str) -> None:
    """Run a script of this folder that compares kernels with their oracles, in its own process.

    On "cpu" with interpreted kernels (triton must learn that before it is imported), or on "cuda".
    """
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), device],
        env={**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "agreed"


@dataclass(frozen=True)
class Report:
    """One kernel for one architecture.

    registers: per thread; stack: bytes per thread, where spilled registers live; shared: bytes per
    program; loads, stores: PTX accesses to global memory by their width in bits, counted.
    """

    registers: int
    stack: int
    shared: int
    loads: Counter[int]
    stores: Counter[int]
    machine: str = field(repr=False)

    @property
    def wide_loads(self) -> int:
        """128-bit loads in the machine code: LDG.E.128, or LDGSTS straight to shared memory."""
        return len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128\b", self.machine))

    @property
    def tensor_cores(self) -> int:
        """Integer products of tensor cores in the machine code."""
        return len(re.findall(r"\b(?:IMMA|IGMMA|UTC\w*MMA)\b", self.machine))


def _widths(kind: str, ptx: str) -> Counter[int]:
    """Bits of each access: ``ld.global.v4.b32`` is 128."""
    found = re.findall(rf"\b{kind}\.global(?:\.\w+?)*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return Counter(int(many or 1) * int(bits) for many, bits in found)


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...],
    capability: int,
    folder: Path,
    warps: int = 4,
    stages: int = 3,
) -> Report:
    """Compile as a launch would with these argument types.

    types: Triton's name of the type of each run-time argument; constants: compile-time arguments;
    divisible: arguments that a launch would find to be multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    cubin = folder / f"{kernel.__name__}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = {
        key: int(value)
        for key, value in re.findall(
            r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        )
    }
    ptx = compiled.asm["ptx"]
    return Report(
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        loads=_widths("ld", ptx) + _widths(r"cp\.async\.c[ag]\.shared", ptx),
        stores=_widths("st", ptx),
        machine=_tool("cuobjdump", "--dump-sass", str(cubin)),
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(path), *arguments], capture_output=True, text=True, check=True
    ).stdout
