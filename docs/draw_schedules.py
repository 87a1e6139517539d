"""Draw docs/images/schedule_NAME.png: the stages of each schedule on two grids.

Run from a checkout with percov2 and matplotlib installed: ``python docs/draw_schedules.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from percov2.entropy.schedule import SCHEDULES, stages

IMAGES = Path(__file__).parent / "images"
NUMBERED_GRID = (8, 8)
LARGE_GRID = (32, 48)


def draw(name: str, path: Path) -> None:
    """Draw one schedule: left with stage numbers, right on the grid of a 768x512 photo."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.2, 3.1), width_ratios=(1, 1.45), layout="constrained"
    )
    for axes, (height, width) in ((left, NUMBERED_GRID), (right, LARGE_GRID)):
        stage_map = stages(name, height, width)
        count = int(stage_map.max())
        axes.imshow(stage_map, cmap="viridis_r", vmin=1, vmax=max(count, 2))
        known = np.cumsum(np.bincount(stage_map.reshape(-1))[1:])
        shown = ", ".join(map(str, known)) if count <= 12 else f"1, 2, ..., {known[-1]}"
        axes.set_title(f"{height}×{width}, {count} stages", fontsize=9)
        axes.set_xlabel(f"known tokens: {shown}", fontsize=5.5)
        axes.set_xticks([])
        axes.set_yticks([])
        if (height, width) == NUMBERED_GRID:
            for (row, column), stage in np.ndenumerate(stage_map):
                color = "white" if stage > 0.6 * count else "black"
                axes.text(
                    column, row, str(stage), ha="center", va="center", fontsize=7, color=color
                )
    figure.suptitle(name, fontsize=11)
    # No metadata: the same picture gives the same bytes.
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draw all schedules."""
    IMAGES.mkdir(exist_ok=True)
    for name in SCHEDULES:
        draw(name, IMAGES / f"schedule_{name}.png")


if __name__ == "__main__":
    main()
