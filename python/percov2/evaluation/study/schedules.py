"""The orders of one token grid that the study of schedules compares (PerCoV2, Table 1)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.schedule import nested_grids, qlds, stages

Order = Callable[[int, int], NDArray[np.int32]]
"""Rows and columns of a grid -> its stage map int32 [h, w], stages 1 .. S."""


class StudySchedule(NamedTuple):
    """How a page calls an order, and its stages."""

    title: str
    stages: Order


def _every_side(height: int, width: int) -> NDArray[np.int32]:
    """Implicit VAR with sides 1, 2, 3, …: unlike those of 1, 2, 4, … its sub-grids do not nest."""
    return nested_grids(height, width, range(1, max(height, width) + 1))


def _flat_qlds(count: int) -> Order:
    """QLDS in groups of equal size."""
    return partial(qlds, stage_count=count, power=Fraction(1))


STUDY_SCHEDULES: dict[str, StudySchedule] = {
    "checkerboard": StudySchedule("checkerboard", partial(stages, "checkerboard")),
    "quincunx": StudySchedule("quincunx", partial(stages, "quincunx")),
    "qlds5": StudySchedule("QLDS, S = 5, α = 2.2", partial(stages, "qlds5")),
    "qlds8": StudySchedule("QLDS, S = 8, α = 2.2", partial(stages, "qlds8")),
    "qlds12": StudySchedule("QLDS, S = 12, α = 2.2", partial(stages, "qlds12")),
    "qlds5_flat": StudySchedule("QLDS, S = 5, α = 1", _flat_qlds(5)),
    "qlds8_flat": StudySchedule("QLDS, S = 8, α = 1", _flat_qlds(8)),
    "qlds12_flat": StudySchedule("QLDS, S = 12, α = 1", _flat_qlds(12)),
    "var": StudySchedule("implicit VAR, sides 1, 2, 4, …", partial(stages, "var")),
    "var_every_side": StudySchedule("implicit VAR, sides 1, 2, 3, …", _every_side),
    "raster": StudySchedule("raster", partial(stages, "raster")),
}
"""Name -> order. Those of the format have its names; the others are no part of it."""


def one_stage(height: int, width: int) -> NDArray[np.int32]:
    """Every position in stage 1: the order of uniform coding."""
    return np.ones((height, width), dtype=np.int32)
