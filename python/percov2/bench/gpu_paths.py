"""Whole coding of a batch on a device: tokens to streams and back, beside the CPU engine."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from percov2.bench import model
from percov2.bench.gpu_cards import Card
from percov2.bench.gpu_device import Gpu, launches
from percov2.bench.gpu_kernels import SCHEDULE, Size
from percov2.bench.own_coder import require
from percov2.bench.results import rate
from percov2.bench.timing import Effort, measure
from percov2.entropy.int_transformer import IntTransformer, random_tensors
from percov2.entropy.token_coder import CODERS, TokenCoder

MEASUREMENT = "measurement"
Streams = tuple[Any, Any]
Record = dict[str, Any]


def measure_paths(
    gpu: Gpu, card: Card, size: Size, threads: int, effort: Effort, cpu_effort: Effort
) -> list[Record]:
    """Encoding and decoding with the model on the device and either coder, and on the CPU.

    The weights are random, which changes no time; the tokens are drawn from the model. Raises
    Mismatch unless bytes and tokens are those of the CPU engine.
    """
    tensors = random_tensors(size.config, 0)
    plain = TokenCoder(IntTransformer(size.config, tensors))
    placed = IntTransformer(size.config, tensors, gpu.place, executor="triton")
    tokens = model.draw_tokens(plain, size.images, size.side)
    checks = np.arange(size.images, dtype=np.uint16)
    places = {"cuda": "all", "cpu": "model"}
    coders = {f"{places[name]} on {card.name}": TokenCoder(placed, name) for name in CODERS}

    def encode(coder: TokenCoder) -> Streams:
        return coder.encoder(tokens, SCHEDULE, checks, threads).finish()

    def decode(coder: TokenCoder) -> torch.Tensor:
        decoder = coder.decoder(*streams)
        return coder.decode(decoder, SCHEDULE, size.side, size.side, threads=threads)

    with model.torch_threads(threads):
        streams = encode(plain)
        for who, coder in coders.items():
            same = all(map(np.array_equal, encode(coder), streams))
            require(same, f"{who}: other bytes than on the CPU")
            require(torch.equal(decode(coder), tokens), f"{who}: other tokens than on the CPU")
        require(torch.equal(decode(plain), tokens), "the CPU engine decodes other tokens")
        case = f"{size.images} x {size.tokens} tokens, V = {size.config.codebook_size}"
        records = []
        for who, coder in {**coders, "CPU engine": plain}.items():
            for what, way in (("encode", encode), ("decode", decode)):
                work = partial(way, coder)
                repeated = cpu_effort if coder is plain else effort
                records.append(
                    {
                        "kind": MEASUREMENT,
                        "section": "paths",
                        "what": what,
                        "who": who,
                        "coder": coder.coder_name,
                        "case": case,
                        "threads": threads,
                        "bytes": len(streams[0]),
                        # Every work ends with a copy to the host, for which the host waits.
                        "wall": rate(measure(work, repeated), size.symbols),
                        "launches": None if coder is plain else launches(gpu.trace(work)),
                    }
                )
    return records
