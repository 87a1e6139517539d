"""Time the codec in process: python benchmarks/codec.py [--quick] [--steps N] [PICTURE ...]

Checks the decoded tokens, then prints JSON: median seconds to encode and to decode one picture with
loaded networks, the parts of each, and the peak memory of the process. The default is a synthetic
picture of 768×512 pixels.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from percov2 import Codec
from percov2.images import read_image


def synthetic(width: int, height: int) -> Image.Image:
    """Return smooth colours with noise, which have as many different tokens as a photo."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 60 * np.sin(x / (31 + 7 * c)) + 60 * np.cos(y / (23 + 5 * c)) for c in range(3)]
    noisy = np.stack(waves, -1) + np.random.default_rng(0).normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def median_seconds(work: Callable[[], object], repetitions: int) -> float:
    """Return the median wall time of several calls."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(
    codec: Codec, image: Image.Image, steps: int | None, repetitions: int
) -> dict[str, Any]:
    """Return the times of one picture, after a first call that loads the networks."""
    (file,) = codec.compress([image])
    tokens = codec.encode_tokens([image])
    decoded = codec.decode([file])
    if not np.array_equal(decoded[0].tokens, tokens[0]):
        raise SystemExit(f"{image.width}x{image.height}: the file decodes to other tokens")
    codec.paint(decoded, steps=steps)
    size = [(image.height, image.width)]
    return {
        "width": image.width,
        "height": image.height,
        "bytes": len(file),
        "encode_s": median_seconds(lambda: codec.compress([image]), repetitions),
        "decode_s": median_seconds(lambda: codec.decompress([file], steps=steps), repetitions),
        "encode_tokens_s": median_seconds(lambda: codec.encode_tokens([image]), repetitions),
        "pack_s": median_seconds(lambda: codec.pack(tokens, size), repetitions),
        "decode_tokens_s": median_seconds(lambda: codec.decode([file]), repetitions),
        "paint_s": median_seconds(lambda: codec.paint(decoded, steps=steps), repetitions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="*", type=Path, help="image files")
    parser.add_argument("--model", default="tiny", help="model name or folder (default: tiny)")
    parser.add_argument("--steps", type=int, help="flow evaluations (default: the model's)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--quick", action="store_true", help="measure a small picture once")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    codec = Codec.from_pretrained(arguments.model)
    images = [read_image(path) for path in arguments.pictures]
    if not images:
        images = [synthetic(256, 192) if arguments.quick else synthetic(768, 512)]
    results = [
        measure(codec, image, arguments.steps, 1 if arguments.quick else 5) for image in images
    ]
    report = {
        "model": codec.config.name,
        "steps": arguments.steps or codec.config.default_steps(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": results,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
