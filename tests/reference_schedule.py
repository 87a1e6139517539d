"""Oracle of the entropy schedules: docs/schedules.md as slow, obvious loops."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal, localcontext


def dense(raw: list[list[int]]) -> list[list[int]]:
    """Renumber the values in use as 1, 2, 3, ... in their order."""
    used = sorted({value for row in raw for value in row})
    return [[used.index(value) + 1 for value in row] for row in raw]


def checkerboard(height: int, width: int) -> list[list[int]]:
    return dense([[(r + c) % 2 for c in range(width)] for r in range(height)])


def raster(height: int, width: int) -> list[list[int]]:
    return [[r * width + c + 1 for c in range(width)] for r in range(height)]


def quincunx(height: int, width: int) -> list[list[int]]:
    step = 1
    while 2 * step < max(height, width):
        step *= 2
    passes = [(step, False)]  # (step, both must be odd multiples)
    while step > 1:
        step //= 2
        passes += [(step, True), (step, False)]

    def first_pass(r: int, c: int) -> int:
        for number, (t, both_odd) in enumerate(passes):
            if r % t == 0 and c % t == 0 and (not both_odd or (r // t % 2 and c // t % 2)):
                return number
        raise AssertionError("the last pass takes every position")

    return dense([[first_pass(r, c) for c in range(width)] for r in range(height)])


def var(height: int, width: int) -> list[list[int]]:
    sides = [1]
    while sides[-1] < max(height, width):
        sides.append(2 * sides[-1])

    def first_side(r: int, c: int) -> int:
        for number, side in enumerate(sides):
            rows = {i * height // side for i in range(side)}
            columns = {i * width // side for i in range(side)}
            if r in rows and c in columns:
                return number
        raise AssertionError("the last side takes every position")

    return dense([[first_side(r, c) for c in range(width)] for r in range(height)])


def qlds_walk(height: int, width: int) -> list[int]:
    """Raster indices in coding order."""
    positions = height * width
    walk: list[int] = []
    seen: set[int] = set()
    for n in range(1, 16 * positions + 64 + 1):
        r = (2**31 + n * 3242174889) % 2**32 * height // 2**32
        c = (2**31 + n * 2447445414) % 2**32 * width // 2**32
        if r * width + c not in seen:
            seen.add(r * width + c)
            walk.append(r * width + c)
        if len(walk) == positions:
            break
    return walk + [p for p in range(positions) if p not in seen]


def power_law_ends(positions: int, stage_count: int) -> list[int]:
    """Cumulative sizes round(N * (i / S)^2.2), computed with 60 decimal digits."""
    count = min(stage_count, positions)
    ends: list[int] = []
    with localcontext() as context:
        context.prec = 60
        for i in range(1, count + 1):
            exact = positions * (Decimal(i) / Decimal(count)) ** Decimal("2.2")
            rounded = int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP))
            ends.append(max(rounded, ends[-1] + 1 if ends else 1))
    return ends


def qlds(height: int, width: int, stage_count: int) -> list[list[int]]:
    ends = power_law_ends(height * width, stage_count)
    result = [[0] * width for _ in range(height)]
    for rank, position in enumerate(qlds_walk(height, width)):
        stage = 1 + sum(rank >= end for end in ends)
        result[position // width][position % width] = stage
    return result


def stages(name: str, height: int, width: int) -> list[list[int]]:
    """The stage map of any schedule by name."""
    if name.startswith("qlds"):
        return qlds(height, width, int(name[4:]))
    by_name = {"quincunx": quincunx, "checkerboard": checkerboard, "var": var, "raster": raster}
    return by_name[name](height, width)
