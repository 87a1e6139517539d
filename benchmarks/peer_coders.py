"""Time constriction, torchac, CompressAI and torch-ans with the interpreter of their environment.

``python peer_coders.py FOLDER``: percov2.bench.peers writes the task there and reads the answer.
benchmarks/peers.sh links this file into that environment, which has no percov2. The task names the
file of percov2.bench.timing. Every peer must return the right symbols before it is timed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

SHARED_TABLES = 64
COMPRESSAI_LOGITS = 2**20
"""Largest number of logits for CompressAI, which takes a Python list per symbol."""


@dataclass(frozen=True)
class Peer:
    """Functions of one coder.

    Attributes:
        prepare: maps logits and symbols of an image to values, symbols, ...; not timed.
        encode: maps tables, symbols, ... to a stream.
        decode: maps tables, a stream, ... to symbols.
        tables: maps values to tables; timed.
    """

    section: str
    coder: str
    given: str
    prepare: Callable[[Any, Any], tuple[Any, ...]]
    encode: Callable[..., Any]
    decode: Callable[..., Any]
    tables: Callable[[Any], Any] = lambda values: values


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of float32 [n, V]."""
    return torch.softmax(torch.from_numpy(logits), -1).numpy()


def bounds(logits: torch.Tensor) -> torch.Tensor:
    """Return the interval bounds in 0 ... 1, float32 [n, V + 1], of logits float32 [n, V]."""
    return pad(torch.softmax(logits, -1).cumsum(-1).clamp_(max=1.0), (1, 0))


def steps(rows: torch.Tensor) -> torch.Tensor:
    """Convert bounds in 0 ... 1 to 16-bit integers, as torchac's encode_float_cdf does."""
    size = rows.shape[-1] - 1
    return (rows * (2**16 - size)).round().to(torch.int32) + torch.arange(size + 1)


def constriction_peers() -> list[Peer]:
    """Return the range and the ANS coder, each from logits and from probabilities."""
    import constriction

    family = constriction.stream.model.Categorical(perfect=False)
    queue, stack = constriction.stream.queue, constriction.stream.stack

    def range_encode(probabilities: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        encoder = queue.RangeEncoder()
        encoder.encode(symbols, family, probabilities)
        return encoder.get_compressed()

    def ans_encode(probabilities: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        encoder = stack.AnsCoder()
        encoder.encode_reverse(symbols, family, probabilities)
        return encoder.get_compressed()

    peers = []
    for name, encode, decoder in (
        ("constriction Range", range_encode, queue.RangeDecoder),
        ("constriction ANS", ans_encode, stack.AnsCoder),
    ):

        def decode(p: np.ndarray, stream: np.ndarray, decoder: Any = decoder) -> np.ndarray:
            return decoder(stream).decode(family, p)

        coder = ("logits", name)
        peers += [
            Peer(*coder, "float32 logits", lambda x, s: (x, s), encode, decode, softmax),
            Peer(*coder, "float32 probabilities", lambda x, s: (softmax(x), s), encode, decode),
        ]
    return peers


def torchac_peers() -> list[Peer]:
    """Return torchac from logits, and from its int16 CDF rows."""
    import torchac

    def tensors(logits: np.ndarray, symbols: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(logits), torch.from_numpy(symbols).to(torch.int16)

    def integer_cdf(logits: np.ndarray, symbols: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        values, chosen = tensors(logits, symbols)
        return steps(bounds(values)).to(torch.int16), chosen

    floats = (torchac.encode_float_cdf, torchac.decode_float_cdf)
    integers = (torchac.encode_int16_normalized_cdf, torchac.decode_int16_normalized_cdf)
    return [
        Peer("logits", "torchac", "float32 logits", tensors, *floats, bounds),
        Peer("coder", "torchac", "int16 CDF rows", integer_cdf, *integers),
    ]


def compressai_extension(name: str) -> Any:
    """Load a compiled module of CompressAI without its package, which imports much more."""
    find = importlib.machinery.PathFinder.find_spec
    package = find("compressai")
    found = package and find(name, package.submodule_search_locations)
    if found is None or found.loader is None:
        raise ImportError(f"compressai is not installed with its compiled module {name}")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def compressai_peers() -> list[Peer]:
    """Return CompressAI from logits with a table per symbol, and one stream with shared tables."""
    ans = compressai_extension("ans")

    def tables(logits: np.ndarray) -> list[list[int]]:
        # CompressAI's pmf_to_quantized_cdf takes quadratic time. The last entry, with one slot, is
        # always the escape to symbols outside the table.
        rows = pad(bounds(torch.from_numpy(logits)), (0, 1))
        rows[:, -1] = 1.0
        return steps(rows).tolist()

    def described(rows: list[list[int]]) -> tuple[list[list[int]], list[int], list[int]]:
        return rows, [len(row) for row in rows], [0] * len(rows)

    def encode(rows: list[list[int]], symbols: list[int], places: list[int]) -> bytes:
        return ans.RansEncoder().encode_with_indexes(symbols, places, *described(rows))

    def decode(rows: list[list[int]], stream: bytes, places: list[int]) -> list[int]:
        return ans.RansDecoder().decode_with_indexes(stream, places, *described(rows))

    def shared(logits: np.ndarray, symbols: np.ndarray) -> Any:
        kept = logits[:SHARED_TABLES]
        places = np.arange(len(symbols)) % len(kept)
        bounds = softmax(kept).astype(np.float64).cumsum(1)
        draws = np.random.default_rng(0).random(len(symbols))
        drawn = [
            min(int(np.searchsorted(bounds[place], draw, "right")), logits.shape[1] - 1)
            for place, draw in zip(places, draws, strict=True)
        ]
        return tables(kept), drawn, places.tolist()

    def own(logits: np.ndarray, symbols: np.ndarray) -> Any:
        return logits, symbols.tolist(), list(range(len(symbols)))

    name, few = "CompressAI ANS", f"{SHARED_TABLES} shared tables"
    return [
        Peer("logits", name, "float32 logits", own, encode, decode, tables),
        Peer("coder", name, few, shared, encode, decode),
    ]


def torch_ans_peers() -> list[Peer]:
    """Return torch-ans with a CDF row per symbol, and with shared rows.

    Its own quantizer of frequencies does not end for some steep distributions, so it gets rows.
    """
    from torch_ans.utils import TorchANSInterface

    def coder(rows: torch.Tensor) -> Any:
        count, size = len(rows), rows.shape[1] - 1
        made = TorchANSInterface(
            impl="rans64", freq_precision=16, device="cpu", bypass_coding=False
        )
        even = torch.full((count, size), 2**16 // size, dtype=torch.int32)
        made.init_params(even, torch.full((count,), size), torch.zeros(count, dtype=torch.int32))
        made.cdfs = rows.to(torch.int32).contiguous()
        return made

    def rows_of(logits: np.ndarray) -> torch.Tensor:
        return steps(bounds(torch.from_numpy(logits)))

    def encode(made: Any, symbols: np.ndarray, places: torch.Tensor) -> bytes:
        return made.encode_with_indexes(torch.from_numpy(symbols)[None], places)

    def decode(made: Any, stream: bytes, places: torch.Tensor) -> np.ndarray:
        return made.decode_with_indexes(stream, places)[0].numpy()

    def own(logits: np.ndarray, symbols: np.ndarray) -> Any:
        return coder(rows_of(logits)), symbols, torch.arange(len(symbols), dtype=torch.int32)[None]

    def shared(logits: np.ndarray, symbols: np.ndarray) -> Any:
        places = torch.arange(len(symbols), dtype=torch.int32)[None] % SHARED_TABLES
        return coder(rows_of(logits[:SHARED_TABLES])), symbols, places

    few = f"{SHARED_TABLES} shared tables"
    return [
        Peer("coder", "torch-ans", "int32 CDF rows", own, encode, decode),
        Peer("coder", "torch-ans", few, shared, encode, decode),
    ]


def measure(
    peer: Peer, logits: np.ndarray, symbols: np.ndarray, timed: Callable[..., Any] | None
) -> dict[str, Any]:
    """Return the record of one peer.

    Args:
        timed: measures a call (percov2.bench.timing.Timing); None for a record without times.

    Raises:
        RuntimeError: the peer does not return the symbols.
    """
    if peer.coder.startswith("CompressAI"):
        if peer.section == "logits":
            count = max(1, COMPRESSAI_LOGITS // logits[0].size)
            logits, symbols = logits[:count], symbols[:count]
        else:  # a call converts the tables from lists to vectors, so one call is fastest
            logits, symbols = logits.reshape(1, -1, logits.shape[2]), symbols.reshape(1, -1)
    inputs = [peer.prepare(*image) for image in zip(logits, symbols, strict=True)]

    def encode_all() -> list[Any]:
        return [peer.encode(peer.tables(values), *rest) for values, *rest in inputs]

    def decode_all() -> list[Any]:
        return [
            peer.decode(peer.tables(values), stream, *rest)
            for (values, _, *rest), stream in zip(inputs, streams, strict=True)
        ]

    streams = encode_all()
    for given, decoded in zip(inputs, decode_all(), strict=True):
        if not np.array_equal(decoded, given[1]):
            raise RuntimeError(f"{peer.coder} decoded other symbols than it encoded")
    images, tokens, codebook = logits.shape
    record: dict[str, Any] = {"section": peer.section, "coder": peer.coder, "given": peer.given}
    record |= {"codebook": codebook, "tokens": tokens, "images": images}
    record["stream_bytes"] = [memoryview(stream).nbytes for stream in streams]
    if timed is not None:
        for way, work in (("encode", encode_all), ("decode", decode_all)):
            record[way] = timed(work).rate(symbols.size)
    return record


def main(folder: Path) -> None:
    """Do the task of a folder; without logits, return only the versions."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    timing, timed = runpy.run_path(task["timing"]), None
    if task["effort"] is not None:
        timed = partial(timing["measure"], effort=timing["Effort"](**task["effort"]))
    torch.set_num_threads(1)
    peers = [*constriction_peers(), *torchac_peers(), *compressai_peers(), *torch_ans_peers()]
    records = []
    if (folder / "logits.npy").exists():
        logits, symbols = np.load(folder / "logits.npy"), np.load(folder / "symbols.npy")
        chosen = [peer for peer in peers if peer.section in task["sections"]]
        records = [measure(peer, logits, symbols, timed) for peer in chosen]
    names = ("constriction", "torchac", "compressai", "torch_ans", "numpy", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    answer = {"versions": {"python": sys.version.split()[0], **versions}, "records": records}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
