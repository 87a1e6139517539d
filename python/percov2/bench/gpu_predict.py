"""Predicted times of kernels on a card: what is known without one.

The time of a launch is the longest of

- bandwidth: bytes / bandwidth of the memory,
- issue: instructions of all warps / (4 schedulers * multiprocessors * clock), or, where a launch
  has fewer warps than there are schedulers, those of the one that has most,
- chain: cycles of the longest chain of instructions that wait for each other / clock,
- lookups: cycles of the lookups in tables / (multiprocessors * clock),
- tensor cores: int8 operations / int8 operations per second,

as if each alone were busy: queues, caches that miss, clocks that sink and the launch itself (some
microseconds) are left out. So it is a floor with reasons, not a measurement.
"""

from __future__ import annotations

from typing import Any

from percov2.bench import gpu_compiled
from percov2.bench.gpu_cards import Card, occupancy
from percov2.bench.gpu_compiled import Missing, Usage
from percov2.bench.gpu_kernels import Kernel, Row

PREDICTION = "prediction"
MISSING = "missing"
Record = dict[str, Any]


def times(kernel: Kernel, card: Card, instructions: float | None) -> dict[str, float]:
    """Seconds by what limits a launch; ``instructions`` of all its warps."""
    found = {
        "bandwidth": kernel.bytes / card.bandwidth,
        "chain": kernel.chain_cycles / card.clock_hz,
        "lookups": kernel.lookup_cycles / (card.multiprocessors * card.clock_hz),
        "tensor cores": kernel.tensor_ops / card.int8_ops,
    }
    if instructions is not None:
        warps = kernel.grid * kernel.warps
        schedulers = min(4 * card.multiprocessors, warps)
        found["issue"] = instructions / (schedulers * card.clock_hz)
    return {name: seconds for name, seconds in found.items() if seconds > 0}


def predict(row: Row, card: Card) -> Record:
    """What is known of a kernel on a card: a record of kind "prediction", or "missing".

    A "missing" record says in ``why`` what this machine lacks and how to get it.
    """
    known = {"section": "kernels", "card": card.name, "kernel": row.name, "case": row.case}
    try:
        kernel = _made(row)
        usage, instructions = _compiled(row, kernel, card)
    except Missing as missing:
        return {"kind": MISSING, **known, "why": str(missing)}
    resident = occupancy(card, kernel.warps, usage.registers, usage.shared, kernel.grid)
    limits = times(kernel, card, instructions)
    limit = max(limits, key=lambda name: limits[name])
    return {
        "kind": PREDICTION,
        **known,
        "registers": usage.registers,
        "shared_bytes": usage.shared,
        "stack_bytes": usage.stack,
        "grid": kernel.grid,
        "block_warps": kernel.warps,
        "resident_warps": resident.warps,
        "resident_limit": resident.limit,
        "symbols": row.symbols,
        "bytes": kernel.bytes,
        "instructions": instructions,
        "limits_s": limits,
        "predicted_s": limits[limit],
        "predicted_limit": limit,
        "predicted_msym_per_s": row.symbols / limits[limit] / 1e6,
    }


def _made(row: Row) -> Kernel:
    if row.triton:
        gpu_compiled.require_triton()
    return row.make()


def _compiled(row: Row, kernel: Kernel, card: Card) -> tuple[Usage, float | None]:
    """Usage of a kernel, and the instructions of all its warps."""
    if kernel.source is None:
        usages = gpu_compiled.installed_usages()
        code = gpu_compiled.code_for(card.capability, {a for _, a in usages})
        return usages[row.name, code], kernel.instructions
    report = gpu_compiled.compile_kernel(kernel.source, card.capability)
    each = gpu_compiled.instructions(report.machine, kernel.trips)
    return report, each * kernel.warps * kernel.grid
