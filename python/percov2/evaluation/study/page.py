"""The page and the pictures of the study of entropy schedules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.evaluation.writers import markdown_table

__all__ = ["draw_stages", "page", "panels", "saved"]

_MOST_STAGES = 16
"""Largest number of stages that the page lists one by one."""
_PANELS = 12
_COLUMNS = 6
_COLOURS = ("#e4e4e4", "#7aa6c2", "#d1495b")
"""Colours of tokens that are unknown, known before, and new in a stage."""


def saved(record: dict[str, Any], uniform: dict[str, Any]) -> tuple[float, float]:
    """Return the savings over uniform coding in percent: of a map's bytes, and of its bits.

    Bits are compared per map, because a method may have more tokens than the single grid.
    """
    bits = [r["bits_per_token"] * r["tokens"] / r["maps"] for r in (record, uniform)]
    return 100 * (1 - record["bytes"] / uniform["bytes"]), 100 * (1 - bits[0] / bits[1])


def page(report: dict[str, Any]) -> str:
    """Return the Markdown page: a row per method, bits per token of each stage, and pictures.

    The report has the keys rate, codebook_size, threads, command, notes (lines of Markdown) and
    methods, of which uniform coding is the first. A method has the keys name, title, weights and
    picture (the name of a file or None), and those of ``comparison.measure``.
    """
    rows = report["methods"]
    table = []
    for row in rows:
        by_bytes, by_bits = saved(row, rows[0])
        stages = f"{row['stages']:.1f} / {row['most_stages']}"
        cells = [row["title"], row["weights"], stages, f"{row['bytes']:.2f}", f"{by_bytes:.1f} %"]
        cells += [f"{row['bits_per_token']:.3f}", f"{by_bits:.1f} %"]
        table.append([*cells, *(f"{row[key]:.4f} s" for key in ("encode_s", "decode_s"))])
    head = ["method", "weights", "stages", "bytes", "saved", "bits per token", "bits saved"]
    shown = [row for row in rows if row["most_stages"] <= _MOST_STAGES]
    most = max(row["most_stages"] for row in shown)
    by_stage = []
    for row in shown:
        bits = [f"{bits:.2f}" for bits in row["stage_bits"]]
        by_stage.append([row["title"], row["weights"], *bits, *[""] * (most - len(bits))])
    numbers = map(str, range(1, most + 1))
    parts = [
        f"# Entropy schedules at {report['rate']}",
        f"{rows[0]['maps']} held-out token maps with {rows[0]['tokens']} tokens, codebook "
        f"{report['codebook_size']}. Every map was coded with rANS, decoded stage by stage and "
        "compared. Bytes count a payload with its 16-bit check, without header and caption. "
        "Uniform coding is also measured by real coding. Stages are decoding passes: the mean, and "
        f"those of the largest map. Seconds are per map, on {report['threads']} threads.",
        f"```\n{report['command']}\n```",
        markdown_table([*head, "encode", "decode"], table, 2),
        *report["notes"],
        "## Bits per token of each stage",
        f"For methods with more than {_MOST_STAGES} stages, see report.json.",
        markdown_table(["method", "weights", *numbers], by_stage, 2),
        "## Known tokens after each stage",
        "The photo with the most tokens: red tokens are new, blue ones known before. The bpp count "
        "the intervals of all known tokens, without header, caption and check.",
        *(f"![{row['title']}]({row['picture']})" for row in rows if row["picture"]),
    ]
    return "\n\n".join(parts) + "\n"


def draw_stages(
    stages: Sequence[NDArray[np.integer]],
    bits: Sequence[NDArray[np.float64]],
    pixels: int,
    title: str,
    path: Path,
) -> None:
    """Draw the known tokens of one photo after each stage as PNG, like PerCoV2's Figs. 15-18.

    Args:
        stages: one panel [h, w] per stage: 0 for unknown tokens, 1 for tokens known before, 2 for
            new tokens. The picture shows at most 12 stages, including the last.
        bits: the cost of each stage's tokens in bits. The label of a panel shows their sum so far
            in bpp of the photo.
        pixels: number of pixels of the photo.
        title: title of the picture.
        path: file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    bpp = np.cumsum([part.sum() for part in bits]) / pixels
    chosen = np.unique(np.linspace(0, len(stages) - 1, min(_PANELS, len(stages))).round())
    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(2 * columns, 2.3 * rows + 0.4), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, stage in zip(axes.flat, chosen.astype(int), strict=False):
        axis.set_axis_on()
        axis.imshow(stages[stage], ListedColormap(_COLOURS), vmin=0, vmax=2)
        height, width = stages[stage].shape
        axis.set_xticks(np.arange(1, width) - 0.5, [])
        axis.set_yticks(np.arange(1, height) - 0.5, [])
        axis.tick_params(length=0)
        axis.grid(color="white", linewidth=0.5)
        axis.set_xlabel(f"stage {stage + 1}: {bpp[stage]:.5f} bpp", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def panels(stage_map: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    """Return the panels that ``draw_stages`` takes for a stage map, int32 [h, w]."""
    return [
        (stage_map <= stage).astype(np.int64) + (stage_map == stage)
        for stage in range(1, int(stage_map.max()) + 1)
    ]
