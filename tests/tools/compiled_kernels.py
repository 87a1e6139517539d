"""Triton kernels without a GPU: interpreted, or compiled ahead of time as launches compile them.

cuobjdump, from triton or the CUDA toolkit, prints registers, stack and shared memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest

CAPABILITIES = (80, 90, 100)
RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes of a block; reports from sm_90 on include them."""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def compare_on(device: str, *subjects: str) -> None:
    """Compare kernels with their oracles: run scripts compare_*.py of this folder in a process.

    On "cpu" with interpreted kernels (triton must learn that before it is imported), or on a card.
    """
    result = subprocess.run(
        [sys.executable, "-c", "".join(f"import tools.compare_{s}\n" for s in subjects), device],
        env={**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["agreed"] * len(subjects)


# Reading what the compilers made -----------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What a kernel needs on one architecture.

    registers: per thread; stack: bytes per thread, where spilled registers live; shared: bytes per
    block, without those that the system takes.
    """

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Report(Usage):
    """A Triton kernel.

    loads, stores: PTX accesses to global memory by their width in bits; fills: what loads leave in
    registers where they read nothing.
    """

    loads: Counter[int]
    stores: Counter[int]
    fills: frozenset[str]
    machine: str = field(repr=False)

    @property
    def wide_loads(self) -> int:
        """128-bit loads in the machine code: LDG.E.128, or LDGSTS straight to shared memory."""
        return len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128\b", self.machine))

    @property
    def tensor_cores(self) -> int:
        """Integer products of tensor cores in the machine code."""
        return len(re.findall(r"\b(?:IMMA|IGMMA|UTC\w*MMA)\b", self.machine))

    @property
    def loops(self) -> list[int]:
        """Instructions in the body of every loop of the machine code."""
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", self.machine)
        places = [int(place, 16) for place, _ in lines]
        jumps = [
            (i, re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)) for i, (_, text) in enumerate(lines)
        ]
        targets = [(i, places.index(int(jump[1], 16))) for i, jump in jumps if jump]
        return [i - target + 1 for i, target in targets if target < i]


@dataclass(frozen=True)
class Source:
    """A Triton kernel as a launch compiles it.

    kernel: the function; types: Triton's name of the type of each run-time argument; constants:
    compile-time arguments; divisible: arguments that a launch finds to be multiples of 16.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    warps: int = 4
    stages: int = 3


def compile_kernel(source: Source, capability: int) -> Report:
    """Compile for an architecture (80, 90, ...)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = source.kernel.arg_names
    compiled = triton.compile(
        ASTSource(
            source.kernel,
            {name: source.types.get(name, "constexpr") for name in names},
            constexprs={(names.index(k),): value for k, value in source.constants.items()},
            attrs={(names.index(k),): [["tt.divisibility", 16]] for k in source.divisible},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": source.warps, "num_stages": source.stages},
    )
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ((_, usage),) = _usages(cuobjdump("--dump-resource-usage", str(cubin)))
        machine = cuobjdump("--dump-sass", str(cubin))
    ptx = compiled.asm["ptx"]
    return Report(
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        loads=_widths("ld", ptx) + _widths(r"cp\.async\.c[ag]\.shared", ptx),
        stores=_widths("st", ptx),
        fills=frozenset(re.findall(r"\bmov\.u(?:16|32)\s+%\w+, (0x\w+);", ptx)),
        machine=machine,
    )


def _widths(kind: str, ptx: str) -> Counter[int]:
    """Bits of each access: ``ld.global.v4.b32`` is 128."""
    found = re.findall(rf"\b{kind}\.global(?:\.\w+?)*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return Counter(int(many or 1) * int(bits) for many, bits in found)


def _usages(report: str) -> list[tuple[str, dict[str, int]]]:
    """(symbol, counts by name) of every function in cuobjdump's report on resources."""
    found = re.findall(r"Function (\S+):\s*\n\s*(.*)", report)
    return [
        (name, {key: int(value) for key, value in re.findall(r"\b(\w+):(\d+)", line)})
        for name, line in found
    ]


def module_usages(report: str) -> dict[tuple[str, int], Usage]:
    """(kernel, architecture) -> usage of the CUDA kernels, from cuobjdump's report on a module."""
    found = {}
    parts = re.split(r"arch = sm_(\d+)", report)
    for architecture, text in zip(map(int, parts[1::2]), parts[2::2], strict=True):
        for symbol, usage in _usages(text):
            shared = usage["SHARED"] - (RESERVED_SHARED if architecture >= 90 else 0)
            found[kernel_name(symbol), architecture] = Usage(
                usage["REG"], usage["STACK"] + usage["LOCAL"], shared
            )
    return found


def kernel_name(symbol: str) -> str:
    """The name in csrc: _ZN7percov213decode_kernelILb1EEE... -> decode_kernel<true>.

    Raises ValueError for another symbol.
    """
    match = re.search(r"(encode|pack|decode)_kernel(?:ILb([01])E)?", symbol)
    if match is None:
        raise ValueError(f"{symbol} is no kernel of percov2")
    suffix = {None: "", "0": "<false>", "1": "<true>"}[match[2]]
    return f"{match[1]}_kernel{suffix}"


def cuobjdump(*arguments: str) -> str:
    """What cuobjdump prints; a test without it, or with one that is too old, fails."""
    found = importlib.util.find_spec("triton")
    folders = found.submodule_search_locations if found is not None else None
    brought = [Path(folder) / "backends/nvidia/bin/cuobjdump" for folder in folders or ()]
    tool = next((str(path) for path in brought if path.exists()), shutil.which("cuobjdump"))
    assert tool is not None, "triton brings no cuobjdump, and there is none on PATH"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# How launches compile the kernels ----------------------------------------------------------------

_POINTERS = {"torch.int8": "*i8", "torch.int16": "*i16", "torch.int32": "*i32"}
_POINTERS["torch.float32"] = "*fp32"


def launched(module: str, *arguments: Any) -> Source:
    """Return the kernel that ``launch`` of a module queues, as it would be compiled for a GPU."""
    kernels = importlib.import_module(f"percov2.triton_kernels.{module}")
    with (
        mock.patch.object(kernels, "queue") as queue,
        mock.patch.object(kernels, "require_runnable"),
    ):
        kernels.launch(*arguments)
    kernel, _, *given = queue.call_args.args
    constants = dict(queue.call_args.kwargs)
    types, divisible = {}, []
    for name, value in zip(kernel.arg_names, given, strict=False):
        pointer = hasattr(value, "data_ptr")
        types[name] = _POINTERS[str(value.dtype)] if pointer else "i32"
        if (value.data_ptr() if pointer else value) % 16 == 0:
            divisible.append(name)
    warps = constants.pop("num_warps", 4)
    return Source(kernel, types, constants, tuple(divisible), warps)
