"""The whole entropy model: one-pass encoding, staged decoding, and a float transformer beside it.

Tokens are drawn from the model itself, by decoding random bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from percov2.bench.float_transformer import FloatTransformer
from percov2.bench.own_coder import require
from percov2.bench.timing import Effort, Timing, measure
from percov2.entropy import schedule
from percov2.entropy.rans import RansDecoder, RansEncoder
from percov2.entropy.token_coder import TokenCoder

FLOAT_CHUNKS = (8, 64)
"""The float transformer takes so many images at a time; the faster choice counts."""
Streams = tuple[Any, Any]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch, and with it the integer layers, on a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_streams(images: int, side: int) -> Streams:
    """Random bytes, as many as ``images`` grids could need: what they decode to is likely."""
    size = 3 * side * side  # prob_bits is at most 20
    buffer = np.random.default_rng([images, side]).integers(0, 256, images * size, dtype=np.uint8)
    return buffer, np.arange(images + 1, dtype=np.int64) * size


def draw_tokens(coder: TokenCoder, images: int, side: int) -> torch.Tensor:
    """Tokens drawn from the model: int32 [images, side, side]."""
    return decode(coder, random_streams(images, side), "qlds8", side, 1)


def encode(coder: TokenCoder, tokens: torch.Tensor, name: str, threads: int) -> Streams:
    """Tokens -> streams by one pass; every check is 0."""
    starts, freqs = coder.intervals(tokens, name, threads)
    images, count = starts.shape
    encoder = RansEncoder(np.zeros(images, dtype=np.uint16))
    counts = np.full(images, count, dtype=np.int64)
    encoder.push(starts.reshape(-1), freqs.reshape(-1), counts, coder.prob_bits, threads)
    return encoder.finish()


def decode(coder: TokenCoder, streams: Streams, name: str, side: int, threads: int) -> torch.Tensor:
    """Streams -> tokens, stage by stage."""
    return coder.decode(RansDecoder(*streams), name, side, side, threads=threads)


def _record(what: str, name: str, tokens: torch.Tensor, threads: int, timing: Timing) -> Any:
    images, side = tokens.shape[:2]
    return {
        "section": "model",
        "what": what,
        "schedule": name,
        "grid": side,
        "images": images,
        "threads": threads,
        **asdict(timing),
        "ms_per_image": timing.median_s / images * 1e3,
    }


def encode_and_decode(
    coder: TokenCoder, tokens: torch.Tensor, name: str, threads: int, effort: Effort
) -> list[dict[str, Any]]:
    """Times of both ways for tokens int32 [B, side, side] under one schedule."""
    side = tokens.shape[1]
    with torch_threads(threads):
        streams = encode(coder, tokens, name, threads)
        decoded = decode(coder, streams, name, side, threads)
        require(torch.equal(decoded, tokens), f"{name} decodes other tokens")
        works: dict[str, Callable[[], object]] = {
            "encode": lambda: encode(coder, tokens, name, threads),
            "decode": lambda: decode(coder, streams, name, side, threads),
        }
        return [
            {
                **_record(what, name, tokens, threads, measure(work, effort)),
                "bytes": len(streams[0]),
            }
            for what, work in works.items()
        ]


def _pass(model: FloatTransformer, parts: Sequence[torch.Tensor]) -> None:
    for part in parts:
        model(part)


def float_pass(
    coder: TokenCoder, tokens: torch.Tensor, name: str, effort: Effort
) -> dict[str, Any]:
    """Time of the float transformer's pass from tokens to logits, on one thread."""
    model = FloatTransformer(coder.model.config, schedule.stages(name, *tokens.shape[1:]))
    wide = tokens.to(torch.int64)
    best: Timing | None = None
    chunks = sorted({min(chunk, len(tokens)) for chunk in FLOAT_CHUNKS})
    with torch_threads(1), torch.inference_mode():
        for chunk in chunks:
            timing = measure(partial(_pass, model, wide.split(chunk)), effort)
            if best is None or timing.median_s < best.median_s:
                best = timing
    assert best is not None
    return _record("float32 torch", name, tokens, 1, best)
