"""GPUs as numbers: what predictions divide by, and how much of a kernel fits a multiprocessor.

Figures of NVIDIA's data sheets and of the CUDA programming guide (compute capabilities 8.0, 9.0 and
10.0); nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes for itself from every block (capability >= 8)."""
_REGISTER_UNIT = 256
"""Registers are given to warps in pieces of this many."""
_SHARED_UNIT = 128


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as its maker calls it; capability: 10 * major + minor of its compute capability.
        multiprocessors, clock_hz: how many, and their boost clock.
        bandwidth: bytes per second of its memory.
        warps, blocks, registers, shared: what one multiprocessor holds; shared in bytes.
        int8_ops: int8 tensor-core operations per second, dense.
    """

    name: str
    capability: int
    multiprocessors: int
    clock_hz: float
    bandwidth: float
    int8_ops: float
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    shared: int = 228 * 1024

    @property
    def issues_per_s(self) -> float:
        """Instructions of warps per second: four schedulers, one instruction per cycle each."""
        return 4 * self.multiprocessors * self.clock_hz


CARDS = (
    Card("A100 SXM 80GB", 80, 108, 1.41e9, 2.039e12, 624e12, shared=164 * 1024),
    Card("H100 SXM", 90, 132, 1.755e9, 3.35e12, 1979e12),
    Card("H200 SXM", 90, 132, 1.755e9, 4.8e12, 1979e12),
    Card("B200", 100, 148, 1.85e9, 8.0e12, 4500e12),
)


@dataclass(frozen=True)
class Occupancy:
    """Warps of one kernel that are on a multiprocessor at once, and what keeps more away.

    limit: "registers", "shared memory", "warps", "blocks" (the multiprocessor's own limits) or
    "grid" (the launch has no more).
    """

    warps: int
    limit: str


def occupancy(card: Card, warps: int, registers: int, shared: int, grid: int) -> Occupancy:
    """Resident warps of a launch.

    warps: of a block; registers: of a thread; shared: bytes of a block, without the system's;
    grid: blocks of the launch.
    """
    for_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    for_block = -(-(shared + RESERVED_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    # A scheduler has a quarter of the registers, so warps fit in fours.
    fitting = card.registers // for_warp // 4 * 4 if for_warp else card.warps
    blocks = {
        "warps": card.warps // warps,
        "blocks": card.blocks,
        "registers": fitting // warps,
        "shared memory": card.shared // for_block,
        "grid": -(-grid // card.multiprocessors),
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return Occupancy(blocks[limit] * warps, limit)
