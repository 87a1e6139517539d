"""Time the codec in process: python benchmarks/codec.py [--runtimes onnx,torch] [PICTURE ...]

Checks the decoded tokens, then prints JSON: median seconds to encode and to decode one picture with
loaded networks, the parts of each, and the peak memory of the process. Two runtimes take turns;
"ratios" are medians of the second's time over the first's. The default is a synthetic picture of
768×512 pixels.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from percov2 import BackboneOptions, Codec
from percov2.images import read_image


def synthetic(width: int, height: int) -> Image.Image:
    """Return smooth colours with noise, which have as many different tokens as a photo."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 60 * np.sin(x / (31 + 7 * c)) + 60 * np.cos(y / (23 + 5 * c)) for c in range(3)]
    noisy = np.stack(waves, -1) + np.random.default_rng(0).normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def open_codecs(model: str, runtimes: list[str], threads: int) -> dict[str, Codec]:
    """Return a codec per runtime, each with the same number of threads."""
    codecs = {}
    for runtime in runtimes:
        if runtime == "torch":
            import torch

            torch.set_num_threads(threads)
        own = threads if runtime == "onnx" else None
        options = BackboneOptions(runtime=runtime, threads=own)
        codecs[runtime] = Codec.from_pretrained(model, options=options)
    return codecs


def measure(
    codecs: dict[str, Codec], image: Image.Image, steps: int | None, repetitions: int
) -> dict[str, Any]:
    """Return the times of one picture by runtime, after first calls that load the networks.

    The runtimes take turns, so that a busy moment of the machine slows all of them.
    """
    size = [(image.height, image.width)]
    result: dict[str, Any] = {"width": image.width, "height": image.height, "runtimes": {}}
    work: dict[str, dict[str, Callable[[], object]]] = {}
    for name, codec in codecs.items():
        file = codec.compress(image)
        tokens, decoded = codec.encode_tokens([image]), codec.decode([file])
        if not np.array_equal(decoded[0].tokens, tokens[0]):
            raise SystemExit(f"{image.width}x{image.height}: the file decodes to other tokens")
        codec.paint(decoded, steps=steps)
        result["runtimes"][name] = {"bytes": len(file)}
        work[name] = {
            "encode_s": partial(codec.compress, image),
            "decode_s": partial(codec.decompress, file, steps=steps),
            "encode_tokens_s": partial(codec.encode_tokens, [image]),
            "pack_s": partial(codec.pack, tokens, size),
            "decode_tokens_s": partial(codec.decode, [file]),
            "paint_s": partial(codec.paint, decoded, steps=steps),
        }
    for part in next(iter(work.values())):
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(repetitions):
            for name in work:
                started = time.perf_counter()
                work[name][part]()
                times[name].append(time.perf_counter() - started)
        for name in work:
            result["runtimes"][name][part] = statistics.median(times[name])
        if len(work) > 1:
            first, last = times.values()
            ratios = [b / a for a, b in zip(first, last, strict=True)]
            result.setdefault("ratios", {})[part] = statistics.median(ratios)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="*", type=Path, help="image files")
    parser.add_argument("--model", default="tiny", help="model name or folder (default: tiny)")
    parser.add_argument("--steps", type=int, help="flow evaluations (default: the model's)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    help_ = "comma-separated runtimes, one or two of onnx and torch (default: onnx)"
    parser.add_argument("--runtimes", default="onnx", help=help_)
    parser.add_argument("--quick", action="store_true", help="measure a small picture once")
    arguments = parser.parse_args()
    codecs = open_codecs(arguments.model, arguments.runtimes.split(","), arguments.threads)
    images = [read_image(path) for path in arguments.pictures]
    if not images:
        images = [synthetic(256, 192) if arguments.quick else synthetic(768, 512)]
    repetitions = 1 if arguments.quick else 7
    results = [measure(codecs, image, arguments.steps, repetitions) for image in images]
    config = next(iter(codecs.values())).config
    report = {
        "model": config.name,
        "steps": arguments.steps or config.default_steps(),
        "runtimes": {name: codec.model.runtime for name, codec in codecs.items()},
        "results": results,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
