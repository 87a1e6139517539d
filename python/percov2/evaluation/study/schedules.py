"""Orders of a token grid for the study of schedules (PerCoV2, Table 1)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.schedule import nested_grids, qlds, stages

__all__ = ["STUDY_SCHEDULES", "Order", "StudySchedule", "one_stage"]

Order = Callable[[int, int], NDArray[np.int32]]
"""A function from a grid's rows and columns to its stage map, int32 [h, w], with stages 1..S."""


class StudySchedule(NamedTuple):
    """The title and the stages of an order."""

    title: str
    stages: Order


def _every_side(height: int, width: int) -> NDArray[np.int32]:
    """Return the stages of implicit VAR with sides 1, 2, 3, …, whose sub-grids do not nest."""
    return nested_grids(height, width, range(1, max(height, width) + 1))


def _flat_qlds(count: int) -> Order:
    """Return the order QLDS with ``count`` stages of equal size."""
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
"""Orders by name. Orders that are part of the file format have the format's names."""


def one_stage(height: int, width: int) -> NDArray[np.int32]:
    """Return a stage map with all positions in stage 1, for uniform coding."""
    return np.ones((height, width), dtype=np.int32)
