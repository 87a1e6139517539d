"""What compilers make of the GPU kernels, read from their output on any machine.

Triton's kernels are compiled ahead of time, as a launch would compile them; the CUDA kernels are
read out of the installed module. Registers, stack and shared memory come from cuobjdump, which
comes with triton and with the CUDA toolkit; instructions are counted in the machine code.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from percov2.bench.gpu_cards import RESERVED_SHARED

HOW_TO_GET_TRITON = "triton is not installed: pip install 'percov2[gpu]'"
HOW_TO_GET_CUDA = (
    "percov2's compiled module was built without CUDA: build it where nvcc is installed, with "
    "pip install --no-binary percov2 -C cmake.define.PERCOV2_CUDA=ON percov2"
)
HOW_TO_GET_CUOBJDUMP = (
    "cuobjdump is missing: pip install 'percov2[gpu]' brings one, or put that of a CUDA toolkit "
    "on PATH"
)
_SHORTEST_LOOP = 32
"""Loops of fewer instructions only wait for something; a pass is counted."""


class Missing(RuntimeError):
    """Something that this machine does not have; the message says what and how to get it."""


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


def require_triton() -> None:
    """Raise Missing if triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise Missing(HOW_TO_GET_TRITON)


def compile_kernel(source: Source, capability: int) -> Report:
    """Compile for an architecture (80, 90, ...). Raises Missing without triton or cuobjdump."""
    require_triton()
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
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ((_, usage),) = _usages(_cuobjdump("--dump-resource-usage", str(cubin)))
        machine = _cuobjdump("--dump-sass", str(cubin))
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


def module_usages(path: Path) -> dict[tuple[str, int], Usage]:
    """(kernel, architecture) -> usage, of the CUDA kernels in a compiled module.

    Raises Missing without cuobjdump.
    """
    found = {}
    parts = re.split(r"arch = sm_(\d+)", _cuobjdump("--dump-resource-usage", str(path)))
    for architecture, text in zip(map(int, parts[1::2]), parts[2::2], strict=True):
        for symbol, usage in _usages(text):
            # From sm_90 on the report includes what the system takes.
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


@cache
def installed_usages() -> dict[tuple[str, int], Usage]:
    """``module_usages`` of the module that is installed; Missing if it has no CUDA kernels."""
    from percov2.entropy import rans

    if not rans.cuda_built():
        raise Missing(HOW_TO_GET_CUDA)
    module = importlib.util.find_spec("percov2._native")
    assert module is not None and module.origin is not None  # rans has imported it
    return module_usages(Path(module.origin))


def code_for(capability: int, architectures: set[int]) -> int:
    """The newest code that a card of this capability runs as it is.

    Raises Missing if there is none; the driver then compiles the PTX in the module.
    """
    fitting = [a for a in architectures if a // 10 == capability // 10 and a <= capability]
    if not fitting:
        known = ", ".join(f"sm_{a}" for a in sorted(architectures))
        raise Missing(
            f"the module has code for {known}; sm_{capability} runs its PTX, of which nothing is "
            f"known: build with -C cmake.define.CMAKE_CUDA_ARCHITECTURES={capability}-real"
        )
    return max(fitting)


def instructions(machine: str, trips: tuple[float, ...] = ()) -> float:
    """Instructions that one warp issues, by the machine code of its kernel.

    Code up to the unconditional EXIT, once; of it the bodies of loops as often as ``trips`` says,
    in the order in which they begin: a loop inside another has the product of both as its trips.
    What lies behind is out of the way (waits that last, divergent warps) and not counted. Raises
    ValueError if the code has another number of loops.
    """
    lines = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", machine)
    ]
    ends = [i for i, (_, text) in enumerate(lines) if text == "EXIT"]
    body = lines[: ends[0] + 1] if ends else lines
    place = {address: i for i, (address, _) in enumerate(body)}
    loops: dict[int, int] = {}
    for i, (_, text) in enumerate(body):
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        begin = place.get(int(jump[1], 16)) if jump else None
        if begin is not None and i - begin >= _SHORTEST_LOOP:
            loops[begin] = max(i + 1, loops.get(begin, 0))
    if len(loops) != len(trips):
        raise ValueError(f"the machine code has {len(loops)} loops, not {len(trips)}")
    times = [1.0] * len(body)
    for (begin, end), count in zip(sorted(loops.items()), trips, strict=True):
        times[begin:end] = [count] * (end - begin)
    return sum(times)


def _cuobjdump(*arguments: str) -> str:
    done = subprocess.run([_tool(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise Missing(f"{_tool()} cannot read the kernels ({said}); a newer cuobjdump may")
    return done.stdout


@cache
def _tool() -> str:
    found = importlib.util.find_spec("triton")
    if found is not None and found.submodule_search_locations:
        for folder in found.submodule_search_locations:
            path = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
            if path.exists():
                return str(path)
    on_path = shutil.which("cuobjdump")
    if on_path is None:
        raise Missing(HOW_TO_GET_CUOBJDUMP)
    return on_path
