"""Measurements of the entropy model and of torch: encoding, decoding and one layer's attention.

Tokens are drawn from the model by decoding random bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from percov2.bench.coders import require
from percov2.bench.timing import Effort, Record, Timing, measure
from percov2.entropy import ranges, rans, schedule, visibility
from percov2.entropy.int_transformer import random_tensors
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.torch import intmath
from percov2.entropy.torch.int_transformer import to_tensors
from percov2.entropy.transformer_config import TransformerConfig
from percov2.entropy.visibility import START_ENTRIES, Entries

__all__ = ["AttentionCase", "FloatTransformer", "attention", "decode", "draw_tokens", "encode"]
__all__ += ["encode_and_decode", "float_pass", "pass_entries", "random_streams", "torch_threads"]

FLOAT_CHUNKS = (8, 64)
"""Numbers of images per call of torch. The faster of the two counts."""
Streams = tuple[Any, Any]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set the number of threads of torch and of the integer layers within a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_streams(images: int, side: int) -> Streams:
    """Return streams of random bytes for ``images`` grids, which decode to likely tokens."""
    size = 3 * side * side  # prob_bits is at most 20
    buffer = np.random.default_rng([images, side]).integers(0, 256, images * size, dtype=np.uint8)
    return buffer, np.arange(images + 1, dtype=np.int64) * size


def draw_tokens(coder: TokenCoder, images: int, side: int) -> NDArray[np.int32]:
    """Draw tokens from the model. Return int32 [images, side, side]."""
    return decode(coder, random_streams(images, side), "qlds8", side, 1)


def encode(coder: TokenCoder, tokens: NDArray[np.int32], name: str, threads: int) -> Streams:
    """Encode tokens in one pass, with all checks 0."""
    checks = np.zeros(len(tokens), dtype=np.uint16)
    return coder.encode(tokens, name, checks, threads).finish()


def decode(coder: TokenCoder, streams: Streams, name: str, side: int, threads: int) -> Any:
    """Decode streams stage by stage."""
    return coder.decode(coder.decoder(*streams), name, side, side, threads=threads)


def _record(
    what: str, name: str, tokens: NDArray[np.int32], threads: int, timing: Timing
) -> Record:
    images, side = tokens.shape[:2]
    case = {"schedule": name, "grid": side, "images": images, "threads": threads}
    return {"section": "model", "what": what, **case, **timing.per_image(images)}


def encode_and_decode(
    coder: TokenCoder, tokens: NDArray[np.int32], name: str, threads: int, effort: Effort
) -> list[Record]:
    """Measure encoding and decoding of tokens, int32 [B, side, side], with one schedule."""
    works: dict[str, Callable[[], Any]] = {"encode": partial(encode, coder, tokens, name, threads)}
    with torch_threads(threads):
        streams = works["encode"]()
        works["decode"] = partial(decode, coder, streams, name, tokens.shape[1], threads)
        require(np.array_equal(works["decode"](), tokens), f"{name} decoded other tokens")
        timings = {what: measure(work, effort) for what, work in works.items()}
    size = {"bytes": len(streams[0])}
    return [_record(what, name, tokens, threads, t) | size for what, t in timings.items()]


def pass_entries(stages: NDArray[np.int32]) -> tuple[NDArray[np.int64], Entries, Entries]:
    """Return the coding order, the readers and the keys of the pass that encodes a grid.

    The keys are the start entries and the contents of all stages except the last, whose contents
    are never read. The readers are the keys, followed by the queries of all tokens.
    """
    coding = schedule.order(stages)
    stage, width = stages.reshape(-1)[coding], stages.shape[1]
    known = int(np.searchsorted(stage, stage[-1]))
    contents = visibility.content_entries(stage[:known], coding[:known], width)
    keys = visibility.join(visibility.start_entries(), contents)
    return coding, visibility.join(keys, visibility.query_entries(stage, coding, width)), keys


class FloatLayer(nn.Module):
    """A layer of attention to contents and a feed-forward network, each added to the residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, inner, hidden = config.dim, config.inner, config.hidden
        self.heads, self.norm = config.heads, nn.LayerNorm(dim)
        self.q, self.kv = nn.Linear(dim, inner), nn.Linear(dim, 2 * inner)
        self.out = nn.Linear(inner, dim)
        up, down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), up, nn.GELU(), down)

    def forward(self, x: Tensor, keys: int, first_reader: int, mask: Tensor) -> Tensor:
        """Return the rows of x [B, E, dim] from ``first_reader`` on, after this layer.

        The first ``keys`` rows of x are the keys. ``mask``, bool [E - first_reader, keys], is True
        for the visible keys.
        """
        y, x = self.norm(x), x[:, first_reader:]
        parts = (self.q(y[:, first_reader:]), *self.kv(y[:, :keys]).chunk(2, -1))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mean = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mean.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class FloatTransformer(nn.Module):
    """A float32 counterpart of the entropy model in eager torch, with random weights.

    It has the same entries, widths and mask. ``stages`` is the stage map of the grids, int32 [h, w]
    with values 1 .. S. The model lacks relative positions, which would make it slower.
    """

    def __init__(self, config: TransformerConfig, stages: NDArray[np.int32]) -> None:
        super().__init__()
        coding, readers, keys = pass_entries(stages)
        self.keys, dim = len(keys), config.dim
        self.mask = torch.from_numpy(visibility.visible(readers, keys))
        self.coding = torch.from_numpy(coding)
        self.token = nn.Embedding(config.codebook_size, dim)
        rows = (1, START_ENTRIES, len(coding))
        self.query, self.start, self.place = (nn.Parameter(torch.randn(n, dim)) for n in rows)
        self.layers = nn.ModuleList(FloatLayer(config) for _ in range(config.layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, config.codebook_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits, float32 [B, h * w, V] in coding order, for tokens int64 [B, h, w]."""
        known = self.keys - START_ENTRIES
        contents = self.token(tokens.flatten(1)[:, self.coding[:known]]) + self.place[:known]
        parts = (self.start, self.query + self.place)
        start, queries = (part.expand(len(tokens), -1, -1) for part in parts)
        x = torch.cat([start, contents, queries], 1)
        for layer in self.layers:
            first = self.keys if layer is self.layers[-1] else 0  # the head reads only queries
            x = layer(x, self.keys, first, self.mask[first:])
        return self.head(x)


def _fastest(images: int, work: Callable[[list[slice]], object], effort: Effort) -> Timing:
    """Return the fastest time of torch over the chunk sizes ``FLOAT_CHUNKS``."""
    timings = []
    for chunk in sorted({min(chunk, images) for chunk in FLOAT_CHUNKS}):
        parts = [slice(begin, begin + chunk) for begin in range(0, images, chunk)]
        timings.append(measure(partial(work, parts), effort))
    return min(timings, key=lambda timing: timing.median_s)


def float_pass(coder: TokenCoder, tokens: NDArray[np.int32], name: str, effort: Effort) -> Record:
    """Measure the float transformer's pass from tokens to logits, on one thread."""
    model = FloatTransformer(coder.model.config, schedule.stages(name, *tokens.shape[1:]))
    wide = torch.from_numpy(tokens).to(torch.int64)
    with torch_threads(1), torch.inference_mode():
        timing = _fastest(len(wide), lambda parts: [model(wide[part]) for part in parts], effort)
    return _record("float32 torch", name, tokens, 1, timing)


class AttentionCase:
    """Random activations for all entries of one pass.

    These are q, int8 [B, E, inner], and kv, int8 [B, K, 2 * inner], which has the keys before the
    values. ``index``, int64 [E, K], is the relative position of each pair.
    """

    def __init__(self, config: TransformerConfig, name: str, side: int, images: int) -> None:
        self.heads, inner = config.heads, config.inner
        self.stages = np.ascontiguousarray(schedule.stages(name, side, side))
        _, readers, keys = pass_entries(self.stages)
        self.index = torch.from_numpy(visibility.relative_index(readers, keys).astype(np.int64))
        rng = np.random.default_rng(0)
        sizes = (images, len(readers), inner), (images, len(keys), 2 * inner)
        self.q, self.kv = (rng.integers(-127, 128, size, dtype=np.int8) for size in sizes)
        prefix, tensors = "layers.0.attention", to_tensors(random_tensors(config, 0))
        self.bias, self.shift = tensors[f"{prefix}.bias"], tensors[f"{prefix}.shift"]
        self.gain_bits = int(tensors[f"{prefix}.gain_bits"])

    def compiled(self) -> NDArray[np.int8]:
        """Return the result of the compiled kernel, int8 [B, E, inner]."""
        bias, shift = self.bias.numpy(), self.shift.numpy()
        return rans.stage_attention(self.stages, bias, shift, self.gain_bits, self.q, self.kv)

    def split(self, images: slice) -> list[Tensor]:
        """Return q, k and v as float32 [images, heads, entries, head_dim]."""
        parts = (self.q[images], *np.split(self.kv[images], 2, axis=-1))
        wide = (torch.from_numpy(part).to(torch.float32) for part in parts)
        return [x.unflatten(2, (self.heads, -1)).transpose(1, 2).contiguous() for x in wide]

    def oracle(self, image: int) -> NDArray[np.int8]:
        """Return the expected result for one image, int8 [E, inner], computed by torch."""
        q, k, v = (part[0] for part in self.split(slice(image, image + 1)))
        bias = pad(self.bias.to(torch.float32), (0, 1), value=float(ranges.HIDDEN_SCORE))
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
        require(equal, "the attention kernel and torch compute different results")
        q, k, v = case.split(slice(images))
        mask = case.index != visibility.HIDDEN_INDEX

        def by_torch(parts: list[slice]) -> None:
            for part in parts:
                scaled_dot_product_attention(q[part], k[part], v[part], mask)

        compiled = measure(case.compiled, effort)
        timings = {"percov2": compiled, "float32 torch": _fastest(images, by_torch, effort)}
    readers, keys = case.index.shape
    sizes = {"schedule": name, "grid": side, "images": images, "entries": readers, "keys": keys}
    names = {who: {"section": "attention", "coder": who} for who in timings}
    return [{**names[who], **sizes, **t.per_image(images)} for who, t in timings.items()]
