"""Compare batch sizes and thread counts: python benchmarks/portability.py FOLDER [--quick]

Encodes the pictures of a folder alone and together, with one and with two threads, under every
schedule except raster. Prints as JSON the numbers of tokens and files that differ, the bytes above
the ideal, and the number of files that decode wrongly. The files of equal tokens must be equal. The
tokens come from float networks, so they are only expected to be equal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from percov2 import Codec
from percov2.container import bitstream
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.schedule import SCHEDULES
from percov2.entropy.token_coder import TokenCoder
from percov2.evaluation.report import pictures_in
from percov2.images import read_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of pictures")
    parser.add_argument("--model", default="tiny", help="model name or folder (default: tiny)")
    parser.add_argument("--quick", action="store_true", help="use only the first two pictures")
    arguments = parser.parse_args()
    paths = pictures_in(arguments.folder)[: 2 if arguments.quick else None]
    images = [read_image(path) for path in paths]
    codec = Codec.from_pretrained(arguments.model)
    rate = codec.config.default_rate
    coder = TokenCoder(IntTransformer.load(codec.model.folder / rate / "entropy"))
    sizes = [(image.height, image.width) for image in images]

    runs = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs[f"{threads} threads, together"] = codec.encode_tokens(images)
        runs[f"{threads} threads, alone"] = [codec.encode_tokens([i])[0] for i in images]
    reference = runs["1 threads, alone"]
    changed_tokens = {
        name: int(sum((a != b).sum() for a, b in zip(reference, tokens, strict=True)))
        for name, tokens in runs.items()
    }

    overhead = []
    changed_files = changed_decodings = 0
    for schedule in SCHEDULES:
        if schedule == "raster":
            continue  # it takes thousands of passes, and the tests cover it
        torch.set_num_threads(2)
        together = codec.pack(reference, sizes, schedule=schedule)
        torch.set_num_threads(1)
        for grid, size, file in zip(reference, sizes, together, strict=True):
            changed_files += codec.pack([grid], [size], schedule=schedule) != [file]
            changed_decodings += not np.array_equal(codec.decode_tokens([file])[0], grid)
            _, freqs = coder.intervals(torch.from_numpy(grid)[None], schedule)
            bits = float((coder.prob_bits - np.log2(freqs)).sum())
            coded = bitstream.read(file).bits
            ideal = (bits + coded["header"] + coded["caption"]) / 8
            overhead.append(len(file) - ideal - 2)
    torch.set_num_threads(2)
    together = codec.decode_tokens(codec.pack(reference, sizes))
    changed_decodings += sum(
        not np.array_equal(a, b) for a, b in zip(reference, together, strict=True)
    )
    report = {
        "pictures": len(images),
        "tokens": int(sum(grid.size for grid in reference)),
        "tokens_that_differ": changed_tokens,
        "files_that_differ": changed_files,
        "files_that_decode_wrongly": changed_decodings,
        "bytes_above_ideal_and_check_mean": float(np.mean(overhead)),
        "bytes_above_ideal_and_check_max": float(np.max(overhead)),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
