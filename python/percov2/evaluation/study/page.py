"""The page and the pictures of the study of entropy schedules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_STAGES = 16
"""More stages than these are not listed one by one."""
_PANELS = 12
_COLUMNS = 6
_COLOURS = ("#e4e4e4", "#7aa6c2", "#d1495b")
"""Unknown, known before, and new in a stage."""


def saved(record: dict[str, Any], uniform: dict[str, Any]) -> tuple[float, float]:
    """Percent saved against uniform coding: of a map's bytes, and of its tokens' bits.

    Bits are compared per map, since a method may have other tokens than the single grid's.
    """
    bits = [r["bits_per_token"] * r["tokens"] / r["maps"] for r in (record, uniform)]
    return 100 * (1 - record["bytes"] / uniform["bytes"]), 100 * (1 - bits[0] / bits[1])


def page(report: dict[str, Any]) -> str:
    """Markdown: one row per method, then bits per token of each stage, then the pictures.

    report: rate, codebook_size, threads, command, notes (lines of Markdown), and ``methods``: per
    row name, title, weights, picture (a file's name or None) and what ``entropy_study.measure``
    returns, uniform coding first.
    """
    rows = report["methods"]
    lines = [
        f"# Entropy schedules at {report['rate']}",
        "",
        f"{rows[0]['maps']} held-out token maps with {rows[0]['tokens']} tokens, codebook "
        f"{report['codebook_size']}. Every map was coded with rANS, decoded stage by stage and "
        "compared. Bytes are a payload with its 16-bit check, without header and caption; "
        "uniform coding is real coding, too. Stages are the passes of decoding: mean, and of the "
        f"largest map. Seconds are per map, on {report['threads']} threads.",
        "",
        "```",
        report["command"],
        "```",
        "",
        "| method | weights | stages | bytes | saved | bits per token | bits saved | encode | "
        "decode |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        by_bytes, by_bits = saved(row, rows[0])
        lines.append(
            f"| {row['title']} | {row['weights']} | {row['stages']:.1f} / {row['most_stages']} "
            f"| {row['bytes']:.2f} | {by_bytes:.1f} % | {row['bits_per_token']:.3f} "
            f"| {by_bits:.1f} % | {row['encode_s']:.4f} s | {row['decode_s']:.4f} s |"
        )
    for note in report["notes"]:
        lines += ["", note]
    lines += ["", "## Bits per token of each stage", ""]
    lines += [f"Methods of more than {_MOST_STAGES} stages: see report.json.", ""]
    shown = [row for row in rows if row["most_stages"] <= _MOST_STAGES]
    most = max(row["most_stages"] for row in shown)
    lines.append(f"| method | weights | {' | '.join(map(str, range(1, most + 1)))} |")
    lines.append("|---|---|" + "--:|" * most)
    for row in shown:
        cells = [f"{bits:.2f}" for bits in row["stage_bits"]]
        cells += [""] * (most - len(cells))
        lines.append(f"| {row['title']} | {row['weights']} | {' | '.join(cells)} |")
    lines += ["", "## Known tokens after each stage", ""]
    lines.append(
        "Of the photo with most tokens: red is new, blue known before. The bpp so far are those of "
        "the tokens' intervals, without header, caption and check."
    )
    for row in rows:
        if row["picture"]:
            lines += ["", f"![{row['title']}]({row['picture']})"]
    return "\n".join(lines) + "\n"


def draw_stages(
    stages: Sequence[NDArray[np.integer]],
    bits: Sequence[NDArray[np.float64]],
    pixels: int,
    title: str,
    path: Path,
) -> None:
    """A PNG like PerCoV2's Figs. 15-18: what is known of one photo after each stage.

    Args:
        stages: of each stage what its panel shows, [h, w]: 0 unknown, 1 known before, 2 new.
        bits: of the tokens of each stage; under a panel stands the sum so far as bpp.
        pixels: of the photo.
        path: at most 12 stages are drawn, the last among them.
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
    """What ``draw_stages`` shows of a stage map int32 [h, w]."""
    return [
        (stage_map <= stage).astype(np.int64) + (stage_map == stage)
        for stage in range(1, int(stage_map.max()) + 1)
    ]
