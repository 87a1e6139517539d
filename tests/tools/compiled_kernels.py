"""Triton kernels without a GPU: interpreted, or compiled ahead of time as launches compile them.

cuobjdump, from triton or the CUDA toolkit, prints registers, stack and shared memory.
"""

from __future__ import annotations

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

_LOGITS = {"INT16": "*i16", "BFLOAT16": "*i16", "FLOAT32": "*fp32"}
_ENDS = {
    "int8": ("STORE", 127, "*i8", "*i8"),
    "int16": ("STORE", 2**15 - 1, "*i8", "*i16"),
    "table": ("TABLE", 127, "*i8", "*i8"),
    "residual": ("RESIDUAL", 2**20, "*i32", "*i32"),
}
ENDS = tuple(_ENDS)
"""What may follow a linear map."""


def symbol_intervals_source(codebook: int, kind: str = "INT16") -> Source:
    """Logits of a kind ("INT16", "BFLOAT16", "FLOAT32") to intervals, for any number of rows."""
    from percov2.triton_kernels import intervals

    rows, columns, warps = intervals.block_sizes(codebook)
    pointers = dict.fromkeys(("symbols", "table", "starts", "freqs"), "*i32")
    return Source(
        intervals.intervals_kernel,
        {"logits": _LOGITS[kind], **pointers, "rows": "i32", "spread": "i32"},
        {
            "SIZE": codebook,
            "KIND": getattr(intervals, kind),
            "BLOCK_ROWS": rows,
            "BLOCK_SIZE": columns,
        },
        ("logits", *pointers),
        warps,
    )


def layer_norm_source(dim: int) -> Source:
    """LayerNorm of a width, for any number of rows."""
    from percov2.triton_kernels import int_layernorm

    rows, columns = int_layernorm.block_sizes(dim)
    return Source(
        int_layernorm.int_layernorm_kernel,
        {"residual": "*i32", "gain": "*i16", "out": "*i8", "rows": "i32"},
        {"DIM": dim, "BLOCK_ROWS": rows, "BLOCK_DIM": columns},
        ("residual", "gain", "out"),
    )


def linear_source(rows: int, terms: int, end: str) -> Source:
    """A linear map of ``terms`` inputs with one of ``ENDS``, for few or many rows."""
    from percov2.triton_kernels import int_linear

    block_rows, block_outputs, block_terms, warps = int_linear.block_sizes(rows, terms)
    what, limit, extra, out = _ENDS[end]
    pointers = {"x": "*i8", "weight": "*i8", "bias": "*i32", "multiplier": "*i8", "shift": "*i8"}
    pointers |= {"extra": extra, "out": out}
    return Source(
        int_linear.int_linear_kernel,
        {**pointers, "rows": "i32", "outputs": "i32"},
        {
            "TERMS": terms,
            "LIMIT": limit,
            "END": getattr(int_linear, what),
            "BLOCK_ROWS": block_rows,
            "BLOCK_OUTPUTS": block_outputs,
            "BLOCK_TERMS": block_terms,
        },
        (*pointers, "outputs"),
        warps,
    )


def attention_source(head_dim: int) -> Source:
    """Attention with heads of a width that is a power of two from 32 on."""
    from percov2.triton_kernels import stage_attention

    pointers = dict.fromkeys(("queries", "keys", "values", "out", "shifts", "weights"), "*i8")
    places = ("reader_places", "readers", "first_keys", "listed_keys")
    pointers |= {**dict.fromkeys(places, "*i32"), "biases": "*i16"}
    strides = ("query_batch", "query_stride", "key_batch", "key_stride")
    return Source(
        stage_attention.stage_attention_kernel,
        {**pointers, **dict.fromkeys(("reader_count", "list_size", *strides), "i32")},
        {
            "GAIN_BITS": 2,
            "HEAD_DIM": head_dim,
            "BLOCK_DIM": head_dim,
            "BLOCK": stage_attention.BLOCK,
            "GROUP": stage_attention.GROUP,
        },
        (*pointers, "list_size", *strides),
    )


def nearest_codes_source() -> Source:
    """The nearest codebook vector, for vectors whose length is a multiple of 16."""
    from percov2.triton_kernels import nearest

    return Source(
        nearest.nearest_kernel,
        {
            "vectors": "*fp32",
            "codebook": "*fp32",
            "indices": "*i32",
            "rows": "i32",
            "codes": "i32",
            "dim": "i32",
        },
        {"BLOCK_N": nearest.BLOCK_N, "BLOCK_K": nearest.BLOCK_K, "BLOCK_D": nearest.BLOCK_D},
        ("vectors", "codebook", "indices", "dim"),
    )
