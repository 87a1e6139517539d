"""Times constriction, torchac and CompressAI; runs under the interpreter of their environment.

``python peer_coders.py TASK.json``: percov2.bench.peers writes the task and reads the answer. This
file imports nothing of percov2. Every peer must return the symbols before it is timed, and is timed
as percov2.bench.timing does it.
"""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHARED_TABLES = 64
COMPRESSAI_LOGITS = 2**20
"""CompressAI takes a Python list per symbol; it gets the first images with so many logits."""


@dataclass(frozen=True)
class Peer:
    """One coder: arrays of an image -> stream -> symbols.

    Attributes:
        prepare: what is done before the clock starts: (logits, symbols) of an image -> its input.
        encode: input -> stream; decode: input, stream -> symbols.
    """

    section: str
    coder: str
    given: str
    prepare: Callable[[Any, Any], Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any, Any], Any]


Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]
Decode = Callable[[np.ndarray, np.ndarray], np.ndarray]


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [n, V] -> float32 [n, V]."""
    return torch.softmax(torch.from_numpy(logits), -1).numpy()


# constriction ------------------------------------------------------------------------------------


def constriction_peers() -> list[Peer]:
    """Range and ANS coder, each from logits and from probabilities."""
    import constriction

    family = constriction.stream.model.Categorical(perfect=False)
    queue, stack = constriction.stream.queue, constriction.stream.stack

    def range_encode(probabilities: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        encoder = queue.RangeEncoder()
        encoder.encode(symbols, family, probabilities)
        return encoder.get_compressed()

    def range_decode(probabilities: np.ndarray, stream: np.ndarray) -> np.ndarray:
        return queue.RangeDecoder(stream).decode(family, probabilities)

    def ans_encode(probabilities: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        encoder = stack.AnsCoder()
        encoder.encode_reverse(symbols, family, probabilities)
        return encoder.get_compressed()

    def ans_decode(probabilities: np.ndarray, stream: np.ndarray) -> np.ndarray:
        return stack.AnsCoder(stream).decode(family, probabilities)

    def from_logits(name: str, encode: Encode, decode: Decode) -> Peer:
        return Peer(
            "logits",
            name,
            "float32 logits",
            lambda logits, symbols: (logits, symbols),
            lambda given: encode(softmax(given[0]), given[1]),
            lambda given, stream: decode(softmax(given[0]), stream),
        )

    def from_probabilities(name: str, encode: Encode, decode: Decode) -> Peer:
        return Peer(
            "logits",
            name,
            "float32 probabilities",
            lambda logits, symbols: (softmax(logits), symbols),
            lambda given: encode(*given),
            lambda given, stream: decode(given[0], stream),
        )

    return [
        make(name, encode, decode)
        for name, encode, decode in (
            ("constriction Range", range_encode, range_decode),
            ("constriction ANS", ans_encode, ans_decode),
        )
        for make in (from_logits, from_probabilities)
    ]


# torchac -----------------------------------------------------------------------------------------


def torchac_peers() -> list[Peer]:
    """From logits, and from the int16 CDF rows that it makes of them."""
    import torchac

    def float_cdf(logits: torch.Tensor) -> torch.Tensor:
        bounds = torch.softmax(logits, -1).cumsum(-1).clamp_(max=1.0)
        return torch.nn.functional.pad(bounds, (1, 0))

    def tensors(logits: np.ndarray, symbols: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(logits), torch.from_numpy(symbols).to(torch.int16)

    def integer_cdf(logits: np.ndarray, symbols: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        values, chosen = tensors(logits, symbols)
        bounds, size = float_cdf(values), values.shape[-1]
        # As torchac's encode_float_cdf does it.
        steps = (bounds * (2**16 - size)).round().to(torch.int32) + torch.arange(size + 1)
        return steps.to(torch.int16), chosen

    return [
        Peer(
            "logits",
            "torchac",
            "float32 logits",
            tensors,
            lambda given: torchac.encode_float_cdf(float_cdf(given[0]), given[1]),
            lambda given, stream: torchac.decode_float_cdf(float_cdf(given[0]), stream),
        ),
        Peer(
            "coder",
            "torchac",
            "int16 CDF rows",
            integer_cdf,
            lambda given: torchac.encode_int16_normalized_cdf(*given),
            lambda given, stream: torchac.decode_int16_normalized_cdf(given[0], stream),
        ),
    ]


# CompressAI --------------------------------------------------------------------------------------


def compressai_extension(name: str) -> Any:
    """A compiled module of CompressAI without its package, whose import needs much more."""
    package = importlib.machinery.PathFinder.find_spec("compressai")
    if package is None:
        raise ImportError("compressai is not installed")
    found = importlib.machinery.PathFinder.find_spec(name, package.submodule_search_locations)
    if found is None or found.loader is None:
        raise ImportError(f"compressai has no compiled module {name}")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def compressai_peers() -> list[Peer]:
    """From logits with a table per symbol, and one stream for all with few tables."""
    ans = compressai_extension("ans")

    def tables(logits: np.ndarray) -> list[list[int]]:
        # Made as torchac makes its own: CompressAI's pmf_to_quantized_cdf takes quadratic time. The
        # last entry is always the escape to symbols beyond the table; it gets one slot.
        bounds = torch.softmax(torch.from_numpy(logits), -1).cumsum(-1).clamp_(max=1.0)
        rows = torch.nn.functional.pad(bounds, (1, 1))
        rows[:, -1] = 1.0
        size = rows.shape[1] - 1
        steps = (rows * (2**16 - size)).round().to(torch.int32) + torch.arange(size + 1)
        return steps.tolist()

    def described(rows: list[list[int]]) -> tuple[list[list[int]], list[int], list[int]]:
        return rows, [len(row) for row in rows], [0] * len(rows)

    def encode(symbols: list[int], places: list[int], rows: list[list[int]]) -> bytes:
        return ans.RansEncoder().encode_with_indexes(symbols, places, *described(rows))

    def decode(stream: bytes, places: list[int], rows: list[list[int]]) -> list[int]:
        return ans.RansDecoder().decode_with_indexes(stream, places, *described(rows))

    def own_tables(logits: np.ndarray, symbols: np.ndarray) -> Any:
        return logits, symbols.tolist(), list(range(len(symbols)))

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

    return [
        Peer(
            "logits",
            "CompressAI ANS",
            "float32 logits",
            own_tables,
            lambda given: encode(given[1], given[2], tables(given[0])),
            lambda given, stream: decode(stream, given[2], tables(given[0])),
        ),
        Peer(
            "coder",
            "CompressAI ANS",
            f"{SHARED_TABLES} shared tables",
            shared,
            lambda given: encode(given[1], given[2], given[0]),
            lambda given, stream: decode(stream, given[2], given[0]),
        ),
    ]


# Measuring ---------------------------------------------------------------------------------------


def timed(work: Callable[[], object], effort: dict[str, Any]) -> dict[str, Any]:
    """Median and best seconds of a call, as percov2.bench.timing takes them."""

    def once() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    gc.collect()
    gc.disable()
    work()
    times: list[float] = []
    while len(times) < effort["least"] or (
        len(times) < effort["most"] and sum(times) < effort["seconds"]
    ):
        times.append(once())
    gc.enable()
    return {
        "median_s": statistics.median(times),
        "best_s": min(times),
        "runs": len(times),
    }


def expected(peer: Peer, given: Any) -> np.ndarray:
    """The symbols that an input holds."""
    return np.asarray(given[1])


def measure(peer: Peer, logits: np.ndarray, symbols: np.ndarray, task: Any) -> dict[str, Any]:
    """The record of one peer; RuntimeError if it does not return the symbols."""
    if peer.coder.startswith("CompressAI"):
        if peer.section == "logits":
            count = max(1, COMPRESSAI_LOGITS // logits[0].size)
            logits, symbols = logits[:count], symbols[:count]
        else:  # each call turns the tables from lists into vectors: one call is its best
            logits, symbols = logits.reshape(1, -1, logits.shape[2]), symbols.reshape(1, -1)
    inputs = [peer.prepare(*image) for image in zip(logits, symbols, strict=True)]
    streams = [peer.encode(given) for given in inputs]
    for given, stream in zip(inputs, streams, strict=True):
        if not np.array_equal(np.asarray(peer.decode(given, stream)), expected(peer, given)):
            raise RuntimeError(f"{peer.coder} decoded other symbols than it encoded")
    record = {
        "section": peer.section,
        "coder": peer.coder,
        "given": peer.given,
        "codebook": logits.shape[2],
        "tokens": logits.shape[1],
        "images": logits.shape[0],
        "stream_bytes": [memoryview(stream).nbytes for stream in streams],
    }
    if task["effort"] is None:
        return record

    def encode_all() -> None:
        for given in inputs:
            peer.encode(given)

    def decode_all() -> None:
        for given, stream in zip(inputs, streams, strict=True):
            peer.decode(given, stream)

    for name, work in (("encode", encode_all), ("decode", decode_all)):
        timing = timed(work, task["effort"])
        rate = symbols.size / timing["median_s"] / 1e6
        record[name] = {**timing, "msym_per_s": rate}
    return record


def versions() -> dict[str, str]:
    """Versions of the peers and of what they run on."""
    names = ("constriction", "torchac", "compressai", "numpy", "torch")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": sys.version.split()[0], **found}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    peers = [*constriction_peers(), *torchac_peers(), *compressai_peers()]
    records = []
    if task["logits"] is not None:
        logits, symbols = np.load(task["logits"]), np.load(task["symbols"])
        records = [
            measure(peer, logits, symbols, task)
            for peer in peers
            if peer.section in task["sections"]
        ]
    answer = {"versions": versions(), "records": records}
    Path(task["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
