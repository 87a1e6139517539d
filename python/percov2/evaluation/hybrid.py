"""Bytes and quality by the number of stages sent (PerCoV2, Fig. 3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from percov2.codec import Codec
from percov2.container.tokens_file import token_grid
from percov2.entropy.schedule import stage_count
from percov2.evaluation.gallery import plot_quality
from percov2.evaluation.report import round_trip
from percov2.evaluation.setting import Setting, change, digest, facts_of_run
from percov2.evaluation.writers import write_json
from percov2.files import write_image
from percov2.images import read_image

__all__ = ["plot_stages", "stages_sent"]

STAGE_METRICS = ("psnr", "lpips_alex")
_SHOWN = 6


def stages_sent(
    codec: Codec, paths: Sequence[Path], out: Path, setting: Setting, progress: bool = True
) -> list[dict[str, Any]]:
    """Measure pictures whose files hold 1, 2, … stages. The decoder draws the other stages.

    The largest number of stages is that of the picture with the fewest stages. The function writes
    stages.json to ``out``, and NAME_stages.jpg, which shows the first picture restored. It ignores
    the setting's ``stages`` and ``target_bytes``. An interrupted run resumes from stages.json.

    Returns:
        One record per number of stages with the keys "stages", "of" (the largest number of stages)
        and the means "bytes", "psnr" and "lpips_alex".

    Raises:
        ValueError: there are no pictures, weights of a metric are missing, or ``out`` has records
            of another model, setting or set of pictures.
    """
    if not paths:
        raise ValueError("no pictures to measure")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "stages.json"
    encode = replace(setting.encode, stages=None, target_bytes=None, draw_seed=0)
    whole = replace(setting, encode=encode)
    pictures = {one.name: digest(one.read_bytes()) for one in paths}
    of = {**facts_of_run(codec, whole), "pictures": pictures}
    records: list[dict[str, Any]] = []
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        for key, value in of.items():
            if kept["of"].get(key) != value:
                what = f"{key} {change(kept['of'].get(key), value)}"
                raise ValueError(f"{path} holds another run: {what}; choose another folder")
        records = kept["records"]
    schedule, side = of["schedule"], codec.config.rate(of["rate"]).token_side
    sizes = [(picture.height, picture.width) for picture in map(read_image, paths)]
    total = min(stage_count(schedule, *token_grid(size, side)) for size in sizes)
    known = [record["stages"] for record in records]
    for k in (k for k in range(1, total + 1) if k not in known):
        held = replace(whole, encode=replace(encode, stages=k))
        trips = [
            round_trip(codec, p, held, STAGE_METRICS)
            for p in tqdm(paths, desc=f"{k} of {total} stages", disable=not progress)
        ]
        notes = sorted({note for trip in trips for note in trip.notes})
        if notes:
            raise ValueError("; ".join(notes))
        keys = ("bytes", *STAGE_METRICS)
        means = {key: float(np.mean([trip.record[key] for trip in trips])) for key in keys}
        records.append({"stages": k, "of": total, "pictures": len(paths), **means})
        write_image(trips[0].restored, out / f"{paths[0].stem}_{k:02}.png")
        write_json(path, {"of": of, "records": records})
    shown = []
    for k in np.linspace(1, total, min(_SHOWN, total)).round().astype(int):
        with Image.open(out / f"{paths[0].stem}_{k:02}.png") as picture:
            shown.append(picture.convert("RGB"))
    _page(shown).save(out / f"{paths[0].stem}_stages.jpg", quality=90)
    return records


def _page(pictures: Sequence[Image.Image], columns: int = 3, gap: int = 8) -> Image.Image:
    """Return a page that shows pictures of one size at half size, row by row."""
    width, height = pictures[0].width // 2, pictures[0].height // 2
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        place = (i % columns * (width + gap), i // columns * (height + gap))
        page.paste(picture.resize((width, height), Image.Resampling.LANCZOS), place)
    return page


def plot_stages(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot PSNR and LPIPS against bytes, as PNG. Each point shows its number of stages."""
    title = f"stages sent, of {records[0]['of']}; {records[0]['pictures']} pictures"
    plot_quality({"": records}, ("bytes", "bytes of the whole file"), "stages", title, path)
