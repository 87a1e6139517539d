"""A report as pictures: throughput, bytes above the ideal, cost per image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Record = dict[str, Any]
_INCHES = (9.0, 4.5)


def require_matplotlib() -> None:
    """Raise ValueError if there is no matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install 'percov2[eval]'") from error
    matplotlib.use("Agg")


def write_plots(report: Record, folder: Path) -> list[Path]:
    """Write PNGs of whatever the report holds into ``folder`` and return their paths.

    Raises ValueError without matplotlib, OSError where a file cannot be written.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        _throughput(report["records"], folder / "throughput.png"),
        _overhead(report["records"], folder / "overhead.png"),
        _cost(report["records"], folder / "cost_per_image.png"),
    ]
    return [path for path in drawn if path is not None]


def _figure(panels: int) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(1, panels, figsize=_INCHES, layout="constrained", squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _throughput(records: list[Record], path: Path) -> Path | None:
    """Bars per coder, from logits: a panel per codebook, the shape that was compared first."""
    bars: dict[int, dict[tuple[str, str], Record]] = {}
    for r in records:
        if r["section"] == "logits":
            bars.setdefault(r["codebook"], {}).setdefault((r["coder"], r["given"]), r)
    panels = {codebook: list(group.values()) for codebook, group in bars.items()}
    if not panels:
        return None
    figure, axes = _figure(len(panels))
    for axis, (codebook, group) in zip(axes[0], sorted(panels.items()), strict=True):
        names = [f"{r['coder']}\n{r['given']}" for r in group]
        places = range(len(group))
        for offset, way in ((-0.2, "encode"), (0.2, "decode")):
            axis.barh(
                [place + offset for place in places],
                [r[way]["msym_per_s"] for r in group],
                0.38,
                label=way,
            )
        axis.set_xscale("log")
        axis.set_yticks(list(places), names if axis is axes[0][0] else [""] * len(names))
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
        axis.set_title(f"V = {codebook}")
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("million symbols per second, one thread")
    return _save(figure, path)


def _overhead(records: list[Record], path: Path) -> Path | None:
    """Bars per coder: bytes per image above the ideal, a group per shape."""
    found = [r for r in records if r["section"] == "overhead"]
    if not found:
        return None
    coders = list(dict.fromkeys(r["coder"] for r in found))
    shapes = list(dict.fromkeys((r["codebook"], r["tokens"]) for r in found))
    figure, axes = _figure(1)
    axis = axes[0][0]
    width = 0.8 / len(coders)
    for i, coder in enumerate(coders):
        values = {
            (r["codebook"], r["tokens"]): r["above_ideal"] for r in found if r["coder"] == coder
        }
        places = [place + i * width for place, shape in enumerate(shapes) if shape in values]
        axis.bar(places, [values[s] for s in shapes if s in values], width, label=coder)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(shapes))],
        [f"V = {codebook}, {tokens} tokens" for codebook, tokens in shapes],
    )
    axis.set_ylabel("bytes per image above the ideal, beyond the check")
    axis.legend(fontsize=7)
    return _save(figure, path)


def _cost(records: list[Record], path: Path) -> Path | None:
    """Milliseconds per image over the number of images, one thread."""
    found = [r for r in records if r["section"] == "model" and r["threads"] == 1]
    lines: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for r in found:
        key = (r["what"], r["schedule"], r["grid"])
        lines.setdefault(key, []).append((r["images"], r["ms_per_image"]))
    lines = {key: sorted(points) for key, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, axes = _figure(1)
    axis = axes[0][0]
    for (what, schedule, grid), points in lines.items():
        axis.plot(
            *zip(*points, strict=True), marker="o", label=f"{what}, {schedule}, {grid}x{grid}"
        )
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("images per call")
    axis.set_ylabel("milliseconds per image")
    axis.legend(fontsize=7)
    return _save(figure, path)
