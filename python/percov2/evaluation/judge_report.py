"""Estimates with intervals, paired differences, and the report of a judged run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.evaluation.metrics import METRICS
from percov2.evaluation.photo_bootstrap import Estimate, PhotoBootstrap
from percov2.evaluation.realism import Features
from percov2.evaluation.writers import markdown_table

__all__ = ["as_json", "differences", "estimates", "joined", "page"]

_LABELS = {
    "bpp": ("bpp", "{:.5f}"),
    "psnr": ("PSNR, dB", "{:.3f}"),
    "ms_ssim": ("MS-SSIM", "{:.4f}"),
    "lpips_alex": ("LPIPS (Alex)", "{:.4f}"),
    "lpips_vgg": ("LPIPS (VGG)", "{:.4f}"),
    "dists": ("DISTS", "{:.4f}"),
    "frechet": ("Fréchet", "{:.2f}"),
    "kernel": ("kernel", "{:.4g}"),
}


Run = Mapping[str, NDArray[np.float64]]
"""The arrays that ``joined`` returns, by name."""


def joined(photos: Sequence[Mapping[str, NDArray[Any]]]) -> Run:
    """Join the stored arrays of P photos with N crops.

    Returns "bpp" [P], which counts the whole file, the measures of the crops [N] by name, and
    "features" [N, D]. A missing measure is nan.
    """
    size, pixels = (np.array([int(p[key]) for p in photos]) for key in ("file_bytes", "pixels"))
    names = (*METRICS, "features")
    crops = {name: np.concatenate([photo[name] for photo in photos]) for name in names}
    return {"bpp": 8 * size / pixels, **{name: crops[name].astype(np.float64) for name in names}}


def estimates(
    run: Run, originals: Features, bootstrap: PhotoBootstrap
) -> dict[str, Estimate | None]:
    """Return the estimates of all measures: of bpp over photos, of the others over crops."""
    return {
        "bpp": bootstrap.photo_mean(run["bpp"]),
        **{name: bootstrap.mean(run[name]) for name in METRICS},
        "frechet": bootstrap.frechet(originals, run["features"]),
        "kernel": bootstrap.kernel(originals, run["features"]),
    }


def differences(
    run: Run,
    rival: Run,
    own: Mapping[str, Estimate | None],
    other: Mapping[str, Estimate | None],
    bootstrap: PhotoBootstrap,
) -> dict[str, Estimate | None]:
    """Return ``run`` minus ``rival`` for each measure, over the same crops and resamples.

    Means cover only the crops that have a value in both runs. ``own`` and ``other`` are the
    estimates of the two runs.
    """
    found: dict[str, Estimate | None] = {"bpp": bootstrap.photo_mean(run["bpp"] - rival["bpp"])}
    found |= {name: bootstrap.mean(run[name] - rival[name]) for name in METRICS}
    for name in ("frechet", "kernel"):
        one, two = own[name], other[name]
        assert one is not None and two is not None
        found[name] = one - two
    return found


def as_json(found: Mapping[str, Estimate | None]) -> dict[str, Any]:
    """Return the value, interval and bias of each measure, or None if the measure is missing."""
    return {
        name: one
        and {"value": one.value, "interval": list(one.interval), "bootstrap_bias": one.bias}
        for name, one in found.items()
    }


def page(result: Mapping[str, Any]) -> str:
    """Return the text of realism.md: a table with the run and, if there is one, its rival."""
    rows = [_row(result)]
    if result["against"]:
        empty = ["**difference**", *[""] * 3, str(result["crops"])]
        rows += [_row(result["against"]), [*empty, *_cells(result["against"]["differences"])]]
    head = ["model", "rate", "setting", "photos", "crops", *(x for x, _ in _LABELS.values())]
    limit = "" if result["limit"] is None else f" (limit {result['limit']})"
    notes = [
        f"{result['photos']} of {result['photos_large_enough']} photos{limit}, crops of "
        f"{result['side']}×{result['side']} every {result['stride']} pixels. LPIPS and DISTS "
        f"cover {result['crops_with_distances']} of {result['crops']} crops, the others all.",
        "bpp is a mean over photos, the others are means over crops. Brackets are 95 % bootstrap "
        "intervals over photos.",
        f"Fréchet and kernel distances use features of {result['judge']}. Do not compare them with "
        "FID or KID.",
        f"percov2 {result['percov2']}, torch {result['torch']}, torchmetrics "
        f"{result['torchmetrics']}, {result['device']}, {result['threads']} threads.",
        *result["notes"],
    ]
    return "\n".join([markdown_table(head, rows), "", *(f"- {note}" for note in notes)]) + "\n"


def _row(run: Mapping[str, Any]) -> list[str]:
    setting = f"realism {run['realism']:g}, {run['steps']} steps, guidance {run['guidance']:g}"
    setting += f", seed {run['seed']}"
    for name in ("effort", "slack", "stages", "target_bytes"):
        setting += f", {name} {run[name]}" if run[name] else ""
    facts = [run["model"], run["rate"], setting, str(run["photos"]), str(run["crops"])]
    return [*facts, *_cells(run["measures"])]


def _cells(measures: Mapping[str, Any]) -> list[str]:
    cells = []
    for name, (_, form) in _LABELS.items():
        if found := measures[name]:
            value, *bounds = (form.format(x) for x in (found["value"], *found["interval"]))
            cells.append(f"{value} [{bounds[0]}, {bounds[1]}]")
        else:
            cells.append("–")
    return cells
