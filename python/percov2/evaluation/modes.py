"""Distortion and realism over dial, flow steps and guidance (operating modes; PerCoV2, Fig. 1)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from percov2.codec import Codec
from percov2.evaluation.metrics import measure
from percov2.evaluation.realism import FrechetDistance
from percov2.evaluation.writers import write_json
from percov2.images import from_unit_range, to_unit_range

__all__ = ["operating_modes", "require_captioned"]

MODE_METRICS = ("psnr", "lpips_alex")
_BATCH = 16


def require_captioned(crops: NDArray[np.uint8], captions: Sequence[str]) -> None:
    """Raise ValueError unless crops are uint8 [N, S, S, 3] with one caption per crop."""
    square = crops.ndim == 4 and crops.shape[1] == crops.shape[2] and crops.shape[3] == 3
    if not square or crops.dtype != np.uint8 or len(crops) != len(captions):
        raise ValueError(
            f"{len(captions)} captions for crops {crops.dtype} {crops.shape}; give uint8 "
            "[N, S, S, 3] and one caption each"
        )


def operating_modes(
    codec: Codec,
    crops: NDArray[np.uint8],
    captions: Sequence[str],
    out: Path,
    rate: str | None = None,
    steps: Sequence[int] = (1, 2, 4, 8, 20),
    guidances: Sequence[float] = (1.0, 2.0),
    realisms: Sequence[float | None] = (None,),
    features: torch.nn.Module | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Restore crops in every mode and measure them.

    An interrupted run resumes: modes in out/modes.json are kept. So each combination of model,
    crops and rate needs its own folder. Batch i starts from the noise of seed i.

    Args:
        crops: crops of held-out photos, uint8 [N, S, S, 3]; S is a multiple of the token side.
        captions: one per crop, "" for none.
        realisms: settings of the dial; None for the rate's default.
        features: network of the Fréchet distance; EfficientNet-Lite0 if None.

    Returns a record per mode: realism, steps, guidance, crops, the means of psnr and lpips_alex,
    frechet, and seconds per crop.

    Raises ValueError if crops, captions, steps, guidance or realism do not match, and
    MetricWeightsMissing if a network's weights are not installed.
    """
    require_captioned(crops, captions)
    name = codec.config.rate(codec.config.default_rate if rate is None else rate).name
    out.mkdir(parents=True, exist_ok=True)
    path = out / "modes.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    known = {(record["realism"], record["steps"], record["guidance"]) for record in records}
    settings = dict.fromkeys(codec.config.chosen_realism(name, value) for value in realisms)
    modes = product(settings, steps, map(float, guidances))
    wanted = [mode for mode in modes if mode not in known]
    if not wanted:
        return records
    parts = [slice(i, i + _BATCH) for i in range(0, len(crops), _BATCH)]
    tokens = [
        codec.model.encode_tokens(to_unit_range(crops[part]), name)
        for part in tqdm(parts, desc="tokens", disable=not progress)
    ]
    for realism, count, guidance in wanted:
        asked = None if codec.config.realism is None else realism
        distance = FrechetDistance(features)
        values: list[list[float]] = []
        started, spent = time.perf_counter(), 0.0
        label = f"realism {realism:g}, {count} steps, guidance {guidance:g}"
        for i, part in enumerate(tqdm(parts, desc=label, disable=not progress)):
            before = time.perf_counter()
            pixels = codec.model.reconstruct(
                tokens[i], name, captions[part], count, guidance, i, asked
            )
            spent += time.perf_counter() - before
            restored = from_unit_range(pixels)
            distance.add(_planes(crops[part]), real=True)
            distance.add(_planes(restored), real=False)
            values += _measured(crops[part], restored)
        mode = {"rate": name, "realism": realism, "steps": count, "guidance": guidance}
        sizes = {"crops": len(crops), "side": crops.shape[1]}
        means = dict(zip(MODE_METRICS, np.mean(values, 0).tolist(), strict=True))
        frechet = distance.value()
        times = {"seconds_per_crop": spent / len(crops), "seconds": time.perf_counter() - started}
        records.append({**mode, **sizes, **means, "frechet": frechet, **times})
        write_json(path, records)
    return records


def _planes(crops: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 3, 1, 2)))


def _measured(crops: NDArray[np.uint8], restored: NDArray[np.uint8]) -> list[list[float]]:
    rows = []
    for crop, picture in zip(crops, restored, strict=True):
        values, notes = measure(crop, np.ascontiguousarray(picture), MODE_METRICS)
        if None in values.values():
            raise ValueError("; ".join(notes))
        rows.append([float(values[metric] or 0.0) for metric in MODE_METRICS])
    return rows
