"""An entropy model, its intervals and draws, written from the documents alone.

A part of ``independent_decoder``. "§" is a section of the document that a part names.
"""

from __future__ import annotations

import hashlib
import json
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import isqrt
from operator import mul
from pathlib import Path
from typing import NamedTuple

Place = tuple[int, int]  # row and column of a token


def require(holds: bool, fault: str, error: type[ValueError] = ValueError) -> None:
    if not holds:
        raise error(fault)


# --------------------------------------------------------------------------- schedules.md


def qlds_walk(h: int, w: int) -> list[int]:
    """Raster indices in coding order."""
    size = h * w
    order: dict[int, None] = {}
    for n in range(1, 16 * size + 65):
        a, b = ((2**31 + n * step) % 2**32 for step in (3242174889, 2447445414))
        order[(a * h >> 32) * w + (b * w >> 32)] = None
        if len(order) == size:
            break
    return list(order | dict.fromkeys(range(size)))


def power_law_ends(size: int, most: int) -> list[int]:
    """How many positions the stages 1, 2, … have together."""
    count, ends = min(most, size), [0]
    for i in range(1, count + 1):
        bound = 32 * size**5 * i**11
        k = bisect_right(range(size + 1), bound, 1, key=lambda k: (2 * k - 1) ** 5 * count**11) - 1
        ends.append(max(k, ends[-1] + 1))
    return ends[1:]


def _qlds(h: int, w: int, most: int) -> list[int]:
    ends, stages = power_law_ends(h * w, most), [0] * (h * w)
    for rank, place in enumerate(qlds_walk(h, w)):
        stages[place] = bisect_right(ends, rank) + 1
    return stages


def _quincunx_pass(r: int, c: int, t: int) -> int:
    if r % t == 0 and c % t == 0:
        return 0
    number = 1
    while r % (t := t // 2) or c % t:
        number += 2
    return number if r // t % 2 and c // t % 2 else number + 1


def _var(h: int, w: int) -> list[int]:
    taken, s = {0: 1}, 1
    while s < max(h, w):
        s *= 2
        columns = {i * w // s for i in range(s)}
        for r in {i * h // s for i in range(s)}:
            for c in columns:
                taken.setdefault(r * w + c, s)
    return [taken[n] for n in range(h * w)]


def stage_map(schedule: int, h: int, w: int) -> list[int]:
    """The stage, from 1, of every position in raster order."""
    grid = [(r, c) for r in range(h) for c in range(w)]
    match schedule:
        case 1:
            first = 1
            while 2 * first < max(h, w):
                first *= 2
            keys = [_quincunx_pass(r, c, first) for r, c in grid]
        case 2:
            keys = [(r + c) % 2 for r, c in grid]
        case 3:
            keys = _var(h, w)
        case 4:
            keys = list(range(h * w))
        case _:
            keys = _qlds(h, w, {0: 12, 5: 8, 6: 5}[schedule])
    return ranks(keys)


def ranks(keys: Sequence[int]) -> list[int]:
    """The values in use become 1, 2, 3, … in their order."""
    rank = {key: i for i, key in enumerate(sorted(set(keys)), 1)}
    return [rank[key] for key in keys]


# --------------------------------------------------------------------------- entropy-model.md §1

FORMATS = {"I8": "b", "I16": "h", "I32": "i"}


class Tensor(NamedTuple):
    """One tensor of a model file; a vector has one row."""

    type: str
    shape: list[int]
    raw: bytes
    rows: list[tuple[int, ...]]


class Model(NamedTuple):
    """An entropy model: config.json and the tensors."""

    config: dict[str, int]
    tensors: dict[str, Tensor]

    def row(self, name: str, i: int = 0) -> tuple[int, ...]:
        """Row i of a matrix, or a whole vector."""
        return self.tensors[name].rows[i]

    def linear(self, name: str, x: Sequence[int], low: int, high: int) -> list[int]:
        """§3, Linear with its requantization."""
        parts = (self.row(f"{name}.{part}") for part in ("bias", "multiplier", "shift"))
        out = []
        weights = self.tensors[f"{name}.weight"].rows
        for row, bias, multiplier, shift in zip(weights, *parts, strict=True):
            acc = bias + sum(map(mul, row, x))
            require(abs(acc) < 2**24, "a sum beyond float32's integers")
            out.append(requantize(acc, multiplier, shift, low, high))
        return out


def read_model(folder: Path) -> Model:
    """Read a model's folder. The ranges of §1 are taken for granted."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    require(config["kind"] == "percov2-token-transformer", "another kind of model")
    require(config["version"] == 1, "another version of model")
    data = (folder / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:begin]).items():
        if name != "__metadata__":
            type_, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            raw = data[begin + first : begin + last]
            rows = list(struct.iter_unpack(f"<{shape[-1]}{FORMATS[type_]}", raw))
            tensors[name] = Tensor(type_, shape, raw, rows)
    return Model(config, tensors)


def fingerprint(model: Model) -> bytes:
    """The 32 bytes that stand for a model's content."""
    text = json.dumps(model.config, sort_keys=True, separators=(",", ":")) + "\n"
    digest = hashlib.sha256(text.encode("ascii"))
    for name, (type_, shape, raw, _) in sorted(model.tensors.items()):
        digest.update(f"{name} {type_} {','.join(map(str, shape))}\n".encode() + raw)
    return digest.digest()


def model_id(model: Model, side: int, codebook: bytes) -> int:
    """bitstream.md §1: the id of a rate; `codebook` is float32, little-endian."""
    told = struct.pack(">II", side, model.config["codebook_size"]) + fingerprint(model)
    told += struct.pack(">I", len(codebook)) + codebook
    return int.from_bytes(hashlib.sha256(told).digest()[:2], "big")


# --------------------------------------------------------------------------- entropy-model.md §2–4

SOFTMAX = [int(126.61 * 2 ** (-d / 16) + 0.5) for d in range(128)]


def requantize(acc: int, multiplier: int, shift: int, low: int, high: int) -> int:
    """A sum to the scale of the next layer."""
    return min(max((acc * multiplier + (1 << shift - 1)) >> shift, low), high)


def softmax_weight(distance: int) -> int:
    """The weight of a score so far below the largest."""
    return SOFTMAX[distance] if distance < 128 else 0


def attention_mean(weighted: int, total: int, gain_bits: int) -> int:
    """The weighted mean times 2^gain_bits."""
    v = (weighted << gain_bits) + (total << 7 + gain_bits) + total // 2
    return min(max(v // total - (1 << 7 + gain_bits), -127), 127)


def layer_norm(r: Sequence[int], gain: Sequence[int]) -> list[int]:
    """LayerNorm to bytes."""
    d = len(r)
    c = (sum(r) + (d << 20) + d // 2) // d - 2**20
    y = [v - c for v in r]
    root = isqrt((sum(map(mul, y, y)) << 8) // d) + 1
    out = ((v + (root << 12) + root // 2) // root - 2**12 for v in map(mul, y, gain))
    return [min(max(v, -127), 127) for v in out]


def _add(*terms: Sequence[int]) -> list[int]:
    return [min(max(sum(values), -(2**20)), 2**20) for values in zip(*terms, strict=True)]


class Grid:
    """The program for one grid: takes the tokens of a stage, gives the logits of the next.

    Stages are never looked at: an entry sees what was kept before it and with it.
    """

    def __init__(self, model: Model, h: int, w: int) -> None:
        self.model, self.h, self.w = model, h, w
        heads = range(model.config["heads"])
        self.places: list[Place | None] = []
        # For every layer and head: the keys and the values.
        self.kept = [[([], []) for _ in heads] for _ in range(model.config["layers"])]
        start = [model.row("embedding.start", i) for i in range(3)]
        height = model.row("embedding.height", min(16, (h - 1).bit_length()))
        width = model.row("embedding.width", min(16, (w - 1).bit_length()))
        entries = [list(start[0]), _add(start[1], height), _add(start[2], width)]
        self.run(entries, [None] * 3, keep=True)

    def know(self, tokens: dict[Place, int]) -> None:
        """Run the contents of a stage."""
        entries = [self.payload(p, "embedding.token", t) for p, t in tokens.items()]
        self.run(entries, list(tokens), keep=True)

    def logits(self, place: Place) -> list[int]:
        """Run the query of one position."""
        entry = [self.payload(place, "embedding.query")]
        (logits,) = self.run(entry, [place], answer=True)
        return logits

    def payload(self, place: Place, name: str, i: int = 0) -> list[int]:
        """What an entry starts with."""
        row = self.model.row("embedding.row", 16 * place[0] // self.h)
        column = self.model.row("embedding.column", 16 * place[1] // self.w)
        return _add(self.model.row(name, i), row, column)

    def _visible(self, place: Place | None) -> tuple[list[int], list[int]]:
        """The keys that an entry sees and their indices into the attention's bias."""
        keys, indices = [0, 1, 2], [961, 962, 963]
        for j, other in enumerate(self.places):
            if place and other:
                dy, dx = other[0] - place[0], other[1] - place[1]
                if -15 <= dy <= 15 and -15 <= dx <= 15:
                    keys.append(j)
                    indices.append((dy + 15) * 31 + dx + 15)
        return keys, indices

    def run(
        self,
        entries: list[list[int]],
        places: Sequence[Place | None],
        keep: bool = False,
        answer: bool = False,
    ) -> list[list[int]]:
        """Run entries side by side; `keep` their keys and values, `answer` with their logits."""
        model, width = self.model, self.model.config["head_dim"]
        self.places += places if keep else []
        seen = [self._visible(place) for place in places]
        for i, heads in enumerate(self.kept):
            t = f"layers.{i}."
            xs = [layer_norm(r, model.row(t + "attention_norm.gain")) for r in entries]
            if keep:
                for x in xs:
                    kv = model.linear(t + "kv", x, -127, 127)
                    parts = [kv[j : j + width] for j in range(0, len(kv), width)]
                    for n, (keys, values) in enumerate(heads):
                        keys.append(parts[n])
                        values.append(parts[len(heads) + n])
                if i == len(self.kept) - 1 and not answer:
                    return []  # nobody reads what becomes of them
            for j, (r, x) in enumerate(zip(entries, xs, strict=True)):
                q = model.linear(t + "q", x, -127, 127)
                a = [v for n in range(len(heads)) for v in self._attend(i, n, q, *seen[j])]
                r = _add(r, model.linear(t + "out", a, -(2**20), 2**20))
                up = model.linear(
                    t + "up", layer_norm(r, model.row(t + "mlp_norm.gain")), -127, 127
                )
                x = [model.row(t + "gelu")[u + 128] for u in up]
                entries[j] = _add(r, model.linear(t + "down", x, -(2**20), 2**20))
        xs = [layer_norm(r, model.row("head_norm.gain")) for r in entries]
        return [model.linear("head", x, -(2**15), 2**15 - 1) for x in xs]

    def _attend(
        self, layer: int, head: int, qs: list[int], seen: list[int], indices: list[int]
    ) -> list[int]:
        name, width = f"layers.{layer}.attention.", self.model.config["head_dim"]
        q = qs[head * width : (head + 1) * width]
        keys, values = self.kept[layer][head]
        bias, shift = self.model.row(name + "bias", head), self.model.row(name + "shift")[head]
        bits = self.model.row(name + "gain_bits")[0]
        half = 1 << shift - 1
        scores = [
            (sum(map(mul, q, keys[j])) + half >> shift) + bias[k]
            for j, k in zip(seen, indices, strict=True)
        ]
        top = max(scores)
        weights = [softmax_weight(top - s) for s in scores]
        total = sum(weights)
        columns = zip(*(values[j] for j in seen), strict=True)
        return [attention_mean(sum(map(mul, weights, c)), total, bits) for c in columns]


# --------------------------------------------------------------------------- entropy-model.md §5, 6

TABLE = [2**22 - 1] + [round(2 ** (22 - k / 256)) for k in range(1, 256)]


def table(*freqs: int) -> list[int]:
    """Where each symbol's interval begins, and where the last ends."""
    return list(accumulate(freqs, initial=0))


def _weights(distances: Iterable[int]) -> list[int]:
    return [TABLE[d & 255] >> (d >> 8) for d in distances]


def weights(logits: Sequence[int]) -> list[int]:
    """The weights of one position's logits."""
    top = max(logits)
    return _weights(top - logit for logit in logits)


def intervals(logits: Sequence[int], prob_bits: int | None = None) -> tuple[list[int], int]:
    """The start of every token, and M, of one position's logits; prob_bits (by size if None)."""
    size = len(logits)
    prob_bits = prob_bits or (16 if size <= 256 else 18 if size <= 1024 else 20)
    sums = table(*weights(logits))
    room = (1 << prob_bits) - size
    return [p * room // sums[-1] + i for i, p in enumerate(sums)], prob_bits


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox-4x32-10."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p2 >> 32 ^ c1 ^ k0, p2 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def draw(logits: Sequence[int], seed: int, n: int) -> int:
    """The drawn token of the place n."""
    x0, x1, *_ = philox((n % 2**32, n >> 32, 0, 0), (seed, 0))
    top = max(logits)
    sharp = _weights((top - logit) * 384 // 256 for logit in logits)
    floor = max(sharp) >> 10
    sums = table(*(w if w >= floor else 0 for w in sharp))
    return bisect_right(sums, (x0 << 32 | x1) * sums[-1] >> 64) - 1
