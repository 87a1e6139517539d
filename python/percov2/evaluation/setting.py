"""How an evaluation compresses and restores pictures, and how a report says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from percov2.caption import Captioner, NoCaptioner
from percov2.codec import Codec


@dataclass(frozen=True)
class Setting:
    """How pictures are compressed and restored; None means the model's default."""

    rate: str | None = None
    schedule: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    captioner: Captioner = field(default_factory=NoCaptioner)
    slack: float = 0.0
    stages: int | None = None
    target_bytes: int | None = None
    effort: int = 0
    realism: float | None = None


def compress(codec: Codec, picture: Image.Image, setting: Setting) -> bytes:
    """Compress a picture, mode RGB, into a file. Errors as for ``Codec.compress``."""
    (file,) = codec.compress(
        [picture],
        setting.rate,
        setting.schedule,
        setting.captioner([picture]),
        slack=setting.slack,
        stages=setting.stages,
        target_bytes=setting.target_bytes,
        effort=setting.effort,
    )
    return file


def restore(codec: Codec, file: bytes, setting: Setting) -> Image.Image:
    """Restore a file's picture. Errors as for ``Codec.decompress``."""
    (picture,) = codec.decompress(
        [file], setting.steps, setting.guidance, setting.seed, realism=setting.realism
    )
    return picture


def described(codec: Codec, setting: Setting) -> dict[str, Any]:
    """Model and setting of a report, defaults filled in, as JSON holds them."""
    config = codec.config
    rate = setting.rate or config.default_rate
    return {
        "model": config.name,
        "model_id": f"{codec.model_id(rate):04x}",
        "rate": rate,
        "schedule": setting.schedule or config.default_schedule,
        "steps": setting.steps or config.default_steps(rate),
        "guidance": config.guidance if setting.guidance is None else setting.guidance,
        "realism": config.chosen_realism(rate, setting.realism),
        "seed": setting.seed,
        "effort": setting.effort,
        "slack": setting.slack,
        "stages": setting.stages,
        "target_bytes": setting.target_bytes,
        "captioner": type(setting.captioner).__name__,
    }
