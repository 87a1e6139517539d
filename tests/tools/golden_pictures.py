"""Pictures made by code, and their files by the embedded model of commit 7cf2316.

The files are in tests/data/tiny for ever: later models of that name must still read them. To add
files of a further rate, add cases and run ``python tests/tools/golden_pictures.py``. It writes
missing files and never changes existing ones.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from percov2 import Codec
from percov2.container.tokens_file import Tokens

FOLDER = Path(__file__).parents[1] / "data" / "tiny"
RECORD = FOLDER / "tokens.json"


@dataclass(frozen=True)
class Case:
    """How a file was made.

    Attributes:
        rate, schedule: names.
        size: (width, height) of the picture in pixels.
        kind: of picture, see ``picture``.
        caption: "" for none.
        stages: tokens of so many stages are in the file; None for all.
        draw_seed: of the other tokens.
    """

    rate: str
    schedule: str
    size: tuple[int, int]
    kind: str = "scene"
    caption: str = ""
    stages: int | None = None
    draw_seed: int = 0


CASES = {
    "r031_default": Case("r031", "qlds12", (160, 112)),
    "r031_standard_size": Case("r031", "qlds12", (512, 512)),
    "r031_quincunx_odd": Case("r031", "quincunx", (131, 77), caption="A dog on a beach."),
    "r031_checkerboard": Case("r031", "checkerboard", (96, 64), "noise"),
    "r031_var": Case("r031", "var", (65, 129)),
    "r031_raster": Case("r031", "raster", (50, 81)),
    "r031_qlds8_stages": Case("r031", "qlds8", (200, 120), stages=5),
    "r031_qlds5_seed": Case("r031", "qlds5", (120, 90), stages=3, draw_seed=4711),
    "r031_one_pixel": Case("r031", "qlds12", (1, 1)),
    "r031_line": Case("r031", "qlds12", (333, 1), "noise"),
    "r031_plain": Case("r031", "qlds12", (1024, 640), "plain"),
    "r031_raw_caption": Case("r031", "qlds12", (48, 48), caption="x7#Q 猫 ~~"),
    "r010_default": Case("r010", "qlds12", (383, 257), caption="A red circle on a wall."),
    "r010_quincunx": Case("r010", "quincunx", (320, 96), "noise"),
    "r010_checkerboard": Case("r010", "checkerboard", (161, 255)),
    "r010_var_stages": Case("r010", "var", (256, 256), stages=2, draw_seed=65535),
    "r010_raster": Case("r010", "raster", (97, 160)),
    "r002_default": Case("r002", "qlds12", (640, 427), caption="A boat on a lake in the evening."),
    "r002_stages": Case("r002", "qlds12", (768, 512), stages=6),
    "r002_var": Case("r002", "var", (500, 375)),
    "r002_qlds8": Case("r002", "qlds8", (511, 513), "noise"),
    "r002_qlds5": Case("r002", "qlds5", (63, 65)),
}


def picture(case: Case) -> Image.Image:
    """Smooth colours with a disc and a bar ("scene"), coarse "noise", or one "plain" colour."""
    width, height = case.size
    if case.kind == "plain":
        return Image.new("RGB", case.size, (196, 200, 204))
    y, x = np.mgrid[:height, :width] / 64.0
    generator = np.random.default_rng([width, height])
    if case.kind == "noise":
        blocks = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
        pixels = blocks.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.float64)
    else:
        phases = (0.3, 1.1, 2.4)
        pixels = np.stack([120 + 60 * np.sin(x / 2 + y + p) + 30 * y for p in phases], -1)
        radius = min(width, height) / 256
        disc = (x - width / 128) ** 2 + (y - height / 128) ** 2 < radius**2
        pixels[disc] = (200, 40, 30)
        pixels[(x > width / 80) & (x < width / 80 + 0.4)] = (20, 60, 30)
    pixels += generator.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def record(tokens: Tokens, model_id: int) -> dict[str, Any]:
    """What is kept of the tokens of a file: grid, and SHA-256 as ``info --verify`` prints it."""
    digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    return {"model_id": f"{model_id:04x}", "grid": list(tokens.shape), "sha256": digest}


def main() -> None:
    """Write the files and records that are missing."""
    codec = Codec.from_pretrained("tiny")
    FOLDER.mkdir(exist_ok=True)
    records = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for name, case in CASES.items():
        path = FOLDER / f"{name}.pcv2"
        if path.is_file():
            continue
        (data,) = codec.compress(
            [picture(case)],
            rate=case.rate,
            schedule=case.schedule,
            caption=[case.caption],
            stages=case.stages,
            draw_seed=case.draw_seed,
        )
        path.write_bytes(data)
        records[name] = record(codec.decode_tokens([data])[0], codec.model_id(case.rate))
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in records.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
