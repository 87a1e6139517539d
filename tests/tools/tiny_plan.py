"""The smallest benchmark: every kind of step of ``percov2 bench entropy``, in a second."""

from __future__ import annotations

from pathlib import Path

from percov2.bench.entropy import Plan
from percov2.bench.timing import Effort

MODEL = Path(__file__).parents[1] / "data" / "entropy_v1"
SHORT = Effort(0.0, 1, 1)
TINY = Plan(
    effort=SHORT,
    rounds=2,
    compared=((16, 12, 3),),
    scaling=((16, 5, 2),),
    short=((64, 20, 4),),
    long=((64, 16),),
    long_symbols=300,
    schedules=("qlds5", "checkerboard"),
    grid=4,
    batch=3,
    batches=(1, 9),
    memory=(),
    large_grid=6,
    raster_grid=2,
)
SECTIONS = ("coder", "logits", "overhead", "model", "attention")
