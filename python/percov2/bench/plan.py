"""What one run measures: shapes, repetitions and schedules."""

from __future__ import annotations

from dataclasses import dataclass

from percov2.bench.cases import Shape
from percov2.bench.timing import FULL, QUICK, Effort


@dataclass(frozen=True)
class Plan:
    """What one run measures.

    Attributes:
        effort: how long each call is repeated.
        rounds: how often percov2 and its peers take turns.
        compared: shapes on which the coders, also the peers', are timed.
        scaling: further shapes, for percov2 alone: other lengths and numbers of images.
        short: shapes whose streams' bytes are counted.
        long: (codebook, prob_bits) of long streams of ``long_symbols`` symbols.
        schedules: entropy schedules that are decoded.
        grid: side of the images, in tokens; batch: how many of them.
        batches: numbers of images whose cost per image is compared.
        memory: numbers of images whose peak memory is taken.
        large_grid: side of one large image, decoded with ``schedules[0]``; 0 for none.
        raster_grid: side of one image decoded token by token; 0 for none.
    """

    effort: Effort
    rounds: int
    compared: tuple[Shape, ...]
    scaling: tuple[Shape, ...]
    short: tuple[Shape, ...]
    long: tuple[tuple[int, int], ...]
    long_symbols: int
    schedules: tuple[str, ...]
    grid: int
    batch: int
    batches: tuple[int, ...]
    memory: tuple[int, ...]
    large_grid: int
    raster_grid: int


FULL_PLAN = Plan(
    effort=FULL,
    rounds=3,
    compared=(
        Shape(64, 1024, 64),
        Shape(256, 1024, 64),
        Shape(1024, 1024, 64),
        Shape(8192, 1024, 8),
    ),
    scaling=(
        Shape(256, 64, 64),
        Shape(256, 256, 64),
        Shape(256, 4096, 64),
        Shape(256, 1024, 1),
        Shape(256, 1024, 8),
        Shape(256, 1024, 256),
    ),
    short=(
        Shape(64, 64, 512),
        Shape(256, 256, 256),
        Shape(1024, 1024, 64),
        Shape(8192, 1024, 64),
    ),
    long=((256, 16), (256, 20), (1024, 18), (1024, 20)),
    long_symbols=2**20,
    schedules=("qlds12", "quincunx", "checkerboard", "var", "qlds8", "qlds5"),
    grid=16,
    batch=64,
    batches=(1, 8, 64, 256),
    memory=(1, 64, 256),
    large_grid=32,
    raster_grid=16,
)
QUICK_PLAN = Plan(
    effort=QUICK,
    rounds=1,
    compared=(Shape(256, 256, 16), Shape(1024, 256, 4)),
    scaling=(Shape(256, 64, 16),),
    short=(Shape(64, 64, 64), Shape(256, 256, 32)),
    long=((256, 16),),
    long_symbols=2**15,
    schedules=("qlds12",),
    grid=16,
    batch=2,
    batches=(1,),
    memory=(),
    large_grid=0,
    raster_grid=4,
)
