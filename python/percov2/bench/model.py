"""The entropy model: one-pass encoding, staged decoding, one layer's attention, each beside torch.

Tokens are drawn from the model itself, by decoding random bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from percov2.bench.coders import require
from percov2.bench.float_transformer import FloatTransformer, pass_entries
from percov2.bench.timing import Effort, Timing, measure
from percov2.entropy import intmath, rans, schedule
from percov2.entropy.entries import HIDDEN_INDEX, relative_index
from percov2.entropy.int_transformer import random_tensors
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.transformer_config import TransformerConfig

FLOAT_CHUNKS = (8, 64)
"""Torch takes so many images at a time; the faster choice counts."""
Streams = tuple[Any, Any]
Record = dict[str, Any]


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
    """Return random bytes, as many as ``images`` grids could need: they decode to likely tokens."""
    size = 3 * side * side  # prob_bits is at most 20
    buffer = np.random.default_rng([images, side]).integers(0, 256, images * size, dtype=np.uint8)
    return buffer, np.arange(images + 1, dtype=np.int64) * size


def draw_tokens(coder: TokenCoder, images: int, side: int) -> torch.Tensor:
    """Draw tokens from the model: int32 [images, side, side]."""
    return decode(coder, random_streams(images, side), "qlds8", side, 1)


def encode(coder: TokenCoder, tokens: torch.Tensor, name: str, threads: int) -> Streams:
    """Encode tokens by one pass; every check is 0."""
    checks = np.zeros(len(tokens), dtype=np.uint16)
    return coder.encoder(tokens, name, checks, threads).finish()


def decode(coder: TokenCoder, streams: Streams, name: str, side: int, threads: int) -> torch.Tensor:
    """Decode streams stage by stage."""
    return coder.decode(rans.RansDecoder(*streams), name, side, side, threads=threads)


def _record(what: str, name: str, tokens: torch.Tensor, threads: int, timing: Timing) -> Record:
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
) -> list[Record]:
    """Measure both ways for tokens int32 [B, side, side] under one schedule."""
    side = tokens.shape[1]
    with torch_threads(threads):
        streams = encode(coder, tokens, name, threads)
        decoded = decode(coder, streams, name, side, threads)
        require(torch.equal(decoded, tokens), f"{name} decodes other tokens")
        works: dict[str, Callable[[], object]] = {
            "encode": lambda: encode(coder, tokens, name, threads),
            "decode": lambda: decode(coder, streams, name, side, threads),
        }
        timings = {what: measure(work, effort) for what, work in works.items()}
    size = {"bytes": len(streams[0])}
    return [
        {**_record(what, name, tokens, threads, timing), **size} for what, timing in timings.items()
    ]


def _fastest(images: int, work: Callable[[list[slice]], object], effort: Effort) -> Timing:
    """Time torch on parts of a batch, with each of ``FLOAT_CHUNKS``; the fastest counts."""
    timings = []
    for chunk in sorted({min(chunk, images) for chunk in FLOAT_CHUNKS}):
        parts = [slice(begin, begin + chunk) for begin in range(0, images, chunk)]
        timings.append(measure(partial(work, parts), effort))
    return min(timings, key=lambda timing: timing.median_s)


def float_pass(coder: TokenCoder, tokens: torch.Tensor, name: str, effort: Effort) -> Record:
    """Measure the float transformer's pass from tokens to logits, on one thread."""
    model = FloatTransformer(coder.model.config, schedule.stages(name, *tokens.shape[1:]))
    wide = tokens.to(torch.int64)
    with torch_threads(1), torch.inference_mode():
        timing = _fastest(len(tokens), lambda parts: [model(wide[part]) for part in parts], effort)
    return _record("float32 torch", name, tokens, 1, timing)


# Attention of one layer --------------------------------------------------------------------------


class AttentionCase:
    """Random activations for all entries of one pass.

    Attributes:
        q: int8 [B, E, inner]; kv: int8 [B, K, 2 * inner], keys first.
        index: int64 [E, K], which relative position each pair has.
    """

    def __init__(self, config: TransformerConfig, name: str, side: int, images: int) -> None:
        self.config, self.name, self.side, self.images = config, name, side, images
        self.stages = np.ascontiguousarray(schedule.stages(name, side, side))
        _, readers, keys = pass_entries(self.stages)
        self.index = torch.from_numpy(relative_index(readers, keys).astype(np.int64))
        rng = np.random.default_rng(0)
        self.q, self.kv = (
            rng.integers(-127, 128, (images, len(entries), width * config.inner), dtype=np.int8)
            for entries, width in ((readers, 1), (keys, 2))
        )
        tensors = random_tensors(config, 0)
        self.bias = tensors["layers.0.attention.bias"]
        self.shift = tensors["layers.0.attention.shift"]
        self.gain_bits = int(tensors["layers.0.attention.gain_bits"])

    def compiled(self) -> NDArray[np.int8]:
        """Return the kernel's result: int8 [B, E, inner]."""
        return rans.stage_attention(
            self.stages, self.bias.numpy(), self.shift.numpy(), self.gain_bits, self.q, self.kv
        )

    def heads(self, images: slice) -> list[torch.Tensor]:
        """Return q, k and v as float32 [images, heads, entries, head_dim]."""
        return [
            torch.from_numpy(part[images])
            .to(torch.float32)
            .unflatten(2, (self.config.heads, -1))
            .transpose(1, 2)
            .contiguous()
            for part in (self.q, *np.split(self.kv, 2, axis=-1))
        ]

    def oracle(self, image: int) -> NDArray[np.int8]:
        """Return what the kernel must give for one image, by torch: int8 [E, inner]."""
        q, k, v = (part[0] for part in self.heads(slice(image, image + 1)))
        bias = torch.nn.functional.pad(self.bias.to(torch.float32), (0, 1))
        bias[:, HIDDEN_INDEX] = intmath.HIDDEN_SCORE
        scale = torch.exp2(-self.shift.to(torch.float32))[:, None, None]
        scores = torch.floor(q @ k.transpose(1, 2) * scale + 0.5) + bias[:, self.index]
        weights = intmath.softmax_weights_(scores)
        mean = intmath.attention_mean(weights @ v, weights.sum(-1, keepdim=True), self.gain_bits)
        return mean.transpose(0, 1).flatten(1).to(torch.int8).numpy()


def attention(
    config: TransformerConfig, name: str, side: int, images: int, effort: Effort
) -> list[Record]:
    """Measure the compiled kernel and torch's attention in float32, on one thread."""
    case = AttentionCase(config, name, side, images)
    with torch_threads(1), torch.inference_mode():
        equal = np.array_equal(case.compiled()[-1], case.oracle(images - 1))
        require(equal, "the attention kernel does not compute what torch computes")
        q, k, v = case.heads(slice(images))
        mask = case.index != HIDDEN_INDEX

        def by_torch(parts: list[slice]) -> None:
            for part in parts:
                torch.nn.functional.scaled_dot_product_attention(q[part], k[part], v[part], mask)

        timings = {
            "percov2": measure(case.compiled, effort),
            "float32 torch": _fastest(images, by_torch, effort),
        }
    return [
        {
            "section": "attention",
            "coder": who,
            "schedule": name,
            "grid": side,
            "images": images,
            "entries": case.index.shape[0],
            "keys": case.index.shape[1],
            **asdict(timing),
            "ms_per_image": timing.median_s / images * 1e3,
        }
        for who, timing in timings.items()
    ]
