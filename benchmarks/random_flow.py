"""Test the effect of the flow transformer: python benchmarks/random_flow.py FOLDER [--quick]

Restores the pictures of a folder with the model's flow weights and with random ones, and prints the
mean LPIPS (alex) of both as JSON. Equal values would mean that the flow has no effect.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from percov2 import BackboneOptions, Codec
from percov2.evaluation.metrics import measure
from percov2.evaluation.report import pictures_in
from percov2.images import read_image, to_rgb


def mean_lpips(codec: Codec, pictures: list[Path]) -> float:
    """Return the mean LPIPS (alex) of the pictures after a round trip with default options."""
    values = []
    for path in pictures:
        image = read_image(path)
        (restored,) = codec.decompress(codec.compress([image]))
        record, notes = measure(to_rgb(image), np.asarray(restored), ("lpips_alex",))
        if record["lpips_alex"] is None:
            raise SystemExit("; ".join(notes))
        values.append(record["lpips_alex"])
    return float(np.mean(values))


def randomise_flow(codec: Codec) -> None:
    """Replace the flow transformer's weights by a new random initialisation."""
    torch.manual_seed(0)
    fresh: Any = SD3Transformer2DModel.from_config(codec.model.flow.config)
    codec.model.flow.load_state_dict(fresh.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of pictures")
    parser.add_argument("--model", default="tiny", help="model name or folder (default: tiny)")
    parser.add_argument("--quick", action="store_true", help="use only the first picture")
    arguments = parser.parse_args()
    pictures = pictures_in(arguments.folder)[: 1 if arguments.quick else None]
    codec = Codec.from_pretrained(arguments.model, options=BackboneOptions(runtime="torch"))
    trained = mean_lpips(codec, pictures)
    randomise_flow(codec)
    random = mean_lpips(codec, pictures)
    report = {
        "pictures": len(pictures),
        "lpips_alex_trained": trained,
        "lpips_alex_random_flow": random,
        "difference": random - trained,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
