"""Time the codec in process: python benchmarks/codec.py [--runtimes onnx,torch] [PICTURE ...]

Checks the decoded tokens, then prints JSON: median seconds to encode and to decode one picture with
loaded networks, the parts of each, and the peak memory of the process. Several runtimes take turns
in processes of their own; their ratios are medians over rounds. The default is a synthetic picture
of 768×512 pixels.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
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


def open_codec(model: str, runtime: str, threads: int) -> Codec:
    """Return a codec that uses this number of threads."""
    if runtime == "torch":
        import torch

        torch.set_num_threads(threads)
    own = threads if runtime == "onnx" else None
    return Codec.from_pretrained(model, options=BackboneOptions(runtime=runtime, threads=own))


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
    file = codec.compress(image)
    tokens, decoded = codec.encode_tokens([image]), codec.decode([file])
    if not np.array_equal(decoded[0].tokens, tokens[0]):
        raise SystemExit(f"{image.width}x{image.height}: the file decodes to other tokens")
    codec.paint(decoded, steps=steps)
    work: dict[str, Callable[[], object]] = {
        "encode_s": partial(codec.compress, image),
        "decode_s": partial(codec.decompress, file, steps=steps),
        "encode_tokens_s": partial(codec.encode_tokens, [image]),
        "pack_s": partial(codec.pack, tokens, [(image.height, image.width)]),
        "decode_tokens_s": partial(codec.decode, [file]),
        "paint_s": partial(codec.paint, decoded, steps=steps),
    }
    times = {part: median_seconds(call, repetitions) for part, call in work.items()}
    return {"width": image.width, "height": image.height, "bytes": len(file), **times}


def compared(runtimes: list[str], rounds: int, arguments: list[str]) -> dict[str, Any]:
    """Return the reports of several runtimes and their ratios, over rounds of fresh processes.

    A process of its own keeps one runtime's waiting threads from slowing another.
    """
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in runtimes}
    for _ in range(rounds):
        for name in runtimes:
            command = [sys.executable, __file__, *arguments, "--runtimes", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            reports[name].append(json.loads(done.stdout))
    first, *others = runtimes
    ratios: dict[str, dict[str, float]] = {}
    for name in others:
        pairs = list(zip(reports[first], reports[name], strict=True))
        ratios[f"{name} / {first}"] = {
            part: statistics.median(b["results"][0][part] / a["results"][0][part] for a, b in pairs)
            for part in reports[first][0]["results"][0]
            if part.endswith("_s")
        }
    return {"ratios of the first picture": ratios, "rounds": reports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="*", type=Path, help="image files")
    parser.add_argument("--model", default="tiny", help="model name or folder (default: tiny)")
    parser.add_argument("--steps", type=int, help="flow evaluations (default: the model's)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    parser.add_argument("--runtimes", default="onnx", help="comma-separated (default: onnx)")
    parser.add_argument("--rounds", type=int, default=3, help="of several runtimes (default: 3)")
    parser.add_argument("--quick", action="store_true", help="measure a small picture once")
    arguments = parser.parse_args()
    runtimes = arguments.runtimes.split(",")
    if len(runtimes) > 1:
        print(json.dumps(compared(runtimes, arguments.rounds, sys.argv[1:]), indent=2))
        return
    codec = open_codec(arguments.model, runtimes[0], arguments.threads)
    images = [read_image(path) for path in arguments.pictures]
    if not images:
        images = [synthetic(256, 192) if arguments.quick else synthetic(768, 512)]
    repetitions = 1 if arguments.quick else 7
    report = {
        "model": codec.config.name,
        "steps": arguments.steps or codec.config.default_steps(),
        "runtime": codec.model.runtime,
        "results": [measure(codec, image, arguments.steps, repetitions) for image in images],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
