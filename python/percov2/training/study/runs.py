"""Training runs of the study of entropy schedules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.entropy.int_transformer import IntTransformer
from percov2.files import write_bytes
from percov2.training import checkpoint
from percov2.training.loop import LoopConfig, load_averaged
from percov2.training.settings import build_phase
from percov2.training.stage2 import (
    EntropyConfig,
    EntropyStage,
    RoundedStage,
    TokenMaps,
    trained_model,
)

__all__ = ["OneOrder", "SharedRun", "digest", "fine_tuned", "finished", "shared_run"]

Map = NDArray[np.int32]
OrderOf = Callable[[int, int], Map]
_FINE_RATE = 0.25
"""Peak learning rate of fine-tuning, relative to the peak of the shared run."""


@dataclass(frozen=True)
class SharedRun:
    """A finished run of ``percov2 train entropy``, whose weights serve every schedule."""

    folder: Path
    config: EntropyConfig
    loop: LoopConfig
    fingerprint: str  # of its model, hexadecimal


def shared_run(folder: Path, fingerprint: bytes) -> SharedRun:
    """Return the run in a folder made by ``percov2 train entropy``.

    Args:
        folder: folder of the run.
        fingerprint: expected fingerprint of the run's model.

    Raises:
        ValueError: the run is not finished, is of another version, or has another model.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise ValueError(f"{folder} contains no report.json; finish `percov2 train entropy` there")
    report = json.loads(path.read_text(encoding="utf-8"))
    made, wanted = report["fingerprint"], fingerprint.hex()
    if made != wanted:
        found = f"{folder} made the model {made[:8]}, not {wanted[:8]}"
        raise ValueError(f"{found}: give the run of the rate's entropy model")
    return SharedRun(folder, *build_phase(EntropyConfig, report["settings"]), wanted)


class OneOrder(TokenMaps):
    """Token maps that use the same order for every schedule.

    ``order`` maps rows and columns to a stage map, int32 [h, w].
    """

    def __init__(self, path: Path, order: OrderOf) -> None:
        super().__init__(path, lambda _, height, width: order(height, width))


def digest(maps: Iterable[Map]) -> str:
    """Return the SHA-256 of token maps and their shapes in hexadecimal."""
    found = hashlib.sha256()
    for tokens in maps:
        found.update(repr(tokens.shape).encode() + np.ascontiguousarray(tokens).tobytes())
    return found.hexdigest()


def finished(
    stage: RoundedStage,
    size_classes: tuple[set[int], set[int]],
    loop: LoopConfig,
    out: Path,
    facts: dict[str, str],
) -> IntTransformer:
    """Return ``trained_model`` of a finished run.

    Args:
        stage, size_classes, loop, out: as for ``trained_model``.
        facts: identity of the run's data and first weights. They are stored in ``out``/run.json, so
            that a different run in ``out`` is refused.

    Raises:
        ValueError: ``out`` holds a run of other data, weights or settings.
        RuntimeError: training was interrupted. The same call resumes it.
    """
    described = {**facts, "config": asdict(stage.config), "loop": asdict(loop)}
    text = json.dumps(described, indent=2) + "\n"
    path = out / "run.json"
    if not path.is_file() and not checkpoint.is_present(out / "checkpoint.pt"):
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        other = f"{out} holds a run of other data, weights or settings"
        raise ValueError(f"{other}; remove it or choose another folder")
    model = trained_model(stage, size_classes, loop, out)
    if model is None:
        raise RuntimeError(f"{out} was interrupted before step {loop.steps}; start it again")
    model.save(out / "entropy")
    return model


def fine_tuned(
    shared: SharedRun, data: Path, order: OrderOf, steps: int, out: Path
) -> IntTransformer:
    """Fine-tune the shared weights for one order.

    Args:
        shared: the run with the first weights.
        data: token maps for ``TokenMaps``.
        order: a function from rows and columns to a stage map, int32 [h, w].
        steps: number of steps, all with rounding. Scales move only in the first half.
        out: folder for checkpoint.pt, log.csv, held_out.csv (bits per token) and entropy/. An
            interrupted run in it resumes, and a finished run is used as it is.

    Raises:
        ValueError: token maps or a run in ``out`` do not match.
        RuntimeError: training was interrupted.
    """
    config = replace(shared.config, real_orders=1.0, round_from=0.0, observe_until=0.5)
    config = replace(config, default_orders=1.0)
    loop = replace(shared.loop, steps=steps, warmup=steps // 10)
    loop = replace(loop, learning_rate=loop.learning_rate * _FINE_RATE)
    torch.manual_seed(loop.seed)
    maps = OneOrder(data, order)
    stage = EntropyStage(config, maps)
    if not checkpoint.is_present(out / "checkpoint.pt"):
        load_averaged(shared.folder, stage)
    shapes = sorted({tokens.shape for tokens in maps.maps})
    facts = {
        "data": digest([*maps.maps, *maps.held_out]),
        "order": digest(order(*shape) for shape in shapes),
        "shared": shared.fingerprint,
    }
    return finished(stage, maps.size_classes(), loop, out, facts)
