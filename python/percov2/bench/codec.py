"""``percov2 bench codec``: pictures per second, by phase alone and of all phases together.

A phase runs on all pictures before the next begins, so its time is what it costs alone. Then the
pipeline of ``Codec.compress_many`` runs all phases at once. Results of the two must be equal.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from percov2.batching import in_order
from percov2.bench.coders import require
from percov2.bench.report import environment
from percov2.bench.timing import Record
from percov2.codec import Codec
from percov2.container import tokens_file
from percov2.entropy import rans
from percov2.files import encoded_picture, write_bytes
from percov2.images import decode_image, to_rgb
from percov2.options import DecodeOptions, EncodeOptions

__all__ = ["FULL_PLAN", "QUICK_PLAN", "Plan", "photos_of", "run", "synthetic"]

SCHEMA = 1
MIXED = ((768, 512), (512, 768), (640, 480), (500, 375), (1024, 683), (333, 500), (800, 600))

Item = TypeVar("Item")
Result = TypeVar("Result")


class Plan(NamedTuple):
    """The sets of pictures: a name and (width, height) of each picture."""

    sets: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


FULL_PLAN = Plan((("768x512", ((768, 512),) * 24), ("mixed", (MIXED * 4)[:24])))
QUICK_PLAN = Plan((("mixed", ((96, 64), (64, 96), (80, 80))),))


def synthetic(width: int, height: int, seed: int) -> Image.Image:
    """Return smooth colours with noise, which have about as many different tokens as a photo."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        128
        + 60 * np.sin(x / rng.uniform(20, 60) + rng.uniform(0, 6))
        + 60 * np.cos(y / rng.uniform(20, 60) + rng.uniform(0, 6))
        for _ in range(3)
    ]
    noisy = np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def photos_of(plan: Plan) -> dict[str, list[bytes]]:
    """Return the sets of a plan as synthetic JPEG files."""
    made = {}
    for name, sizes in plan.sets:
        made[name] = [_jpeg(synthetic(*size, seed)) for seed, size in enumerate(sizes)]
    return made


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92)
    return stream.getvalue()


def run(codec: Codec, sets: dict[str, list[bytes]], jobs: int) -> Record:
    """Measure a codec with sets of picture files, and return the report as JSON values.

    Args:
        codec: the codec.
        sets: picture files by the name of their set.
        jobs: number of pictures in work at the same time.

    Raises:
        Mismatch: the pipeline gives other results than the phases.
    """
    records: list[Record] = []
    for name, files in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            bench = _Bench(codec, name, jobs, Path(folder))
            compressed = bench.compress(files)
            bench.decompress(compressed)
        records += bench.records
    return {
        "schema": SCHEMA,
        "benchmark": "codec",
        "environment": {**environment(), "device": str(codec.model.device), "jobs": jobs},
        "model": codec.config.name,
        "rate": codec.config.default_rate,
        "summary": [],
        "records": records,
    }


class _Bench:
    """Times of one set of pictures."""

    def __init__(self, codec: Codec, name: str, jobs: int, folder: Path) -> None:
        self.codec, self.name, self.jobs, self.folder = codec, name, jobs, folder
        alone = codec.model.parallel and jobs > 1
        self.one = codec.with_threads(1) if alone else codec
        self.workers = jobs if codec.model.parallel else 1
        self.records: list[Record] = []

    def compress(self, files: Sequence[bytes]) -> list[bytes]:
        """Measure compression and return the compressed files."""
        one, rate = self.one, self.one.config.default_rate
        point = one.config.rate(rate)
        schedule = one.config.default_schedule
        options = EncodeOptions(rate=rate, schedule=schedule)
        coder = one._entropy(rate)
        one.compress(_read(files[0]), options)  # loads the networks

        arrays = self._phase("compress", "read", _read, files, self.jobs)
        tokens = self._phase("compress", "networks", lambda a: one.encode_tokens([a])[0], arrays)
        sizes = [array.shape[:2] for array in arrays]
        headers = one._headers(point, schedule, sizes, [(0, b"")] * len(sizes), options)

        def intervals(pair: tuple[Any, Any]) -> Any:
            header, grid = pair
            return tokens_file.encode(coder, [header], [grid], None)[0]

        pairs = list(zip(headers, tokens, strict=True))
        encoded = self._phase("compress", "entropy model", intervals, pairs)
        written = self._phase("compress", "coder", lambda e: tokens_file.write([e])[0], encoded)
        self._phase("compress", "write", self._write, enumerate(written), self.jobs)
        begin = time.perf_counter()
        outcomes = self.codec.compress_many(files, options, jobs=self.jobs)
        for i, outcome in enumerate(outcomes):
            self._write((i, outcome.get()))
            require(outcome.get() == written[i], f"picture {i} of {self.name}: other bytes")
        self._together("compress", begin, len(files))
        return written

    def decompress(self, files: Sequence[bytes]) -> None:
        """Measure restoring."""
        one = self.one
        one.decompress(files[0])
        opened = self._phase(
            "decompress", "entropy model, coder", lambda f: one.decode([f])[0], files
        )
        painted = self._phase("decompress", "networks", lambda d: one.paint([d])[0], opened)
        encode = partial(encoded_picture, path="x.png")
        pictures = self._phase("decompress", "PNG", encode, painted, self.jobs)
        self._phase("decompress", "write", self._write, enumerate(pictures), self.jobs)

        def store(numbered: tuple[int, Any]) -> None:
            index, outcome = numbered
            image = outcome.get()
            require(image == painted[index], f"picture {index} of {self.name}: other pixels")
            self._write((index, encode(image)))

        begin = time.perf_counter()
        outcomes = enumerate(self.codec.decompress_many(files, DecodeOptions(), jobs=self.jobs))
        list(in_order(store, outcomes, self.jobs, 2 * self.jobs))
        self._together("decompress", begin, len(files))

    def _phase(
        self,
        direction: str,
        phase: str,
        work: Callable[[Item], Result],
        items: Iterable[Item],
        threads: int | None = None,
    ) -> list[Result]:
        """Run a phase on all items and record its time."""
        threads, items = threads or self.workers, list(items)

        def limited(item: Item) -> Result:
            with rans.limited_threads(1 if threads > 1 else rans.default_threads()):
                return work(item)

        begin = time.perf_counter()
        results = list(in_order(limited, items, threads, 2 * threads))
        self._record(direction, phase, threads, begin, len(items))
        return results

    def _record(self, direction: str, phase: str, threads: int, begin: float, count: int) -> None:
        seconds = time.perf_counter() - begin
        self.records.append(
            {
                "section": "phases",
                "kind": "measurement",
                "set": self.name,
                "direction": direction,
                "phase": phase,
                "threads": threads,
                "pictures": count,
                "s": seconds,
                "pictures_per_s": count / seconds,
            }
        )

    def _together(self, direction: str, begin: float, count: int) -> None:
        """Record the pipeline's time and what it is in relation to its networks."""
        self._record(direction, "all at once", self.jobs, begin, count)
        mine = [r for r in self.records if r["direction"] == direction]
        whole = mine[-1]["s"]
        networks = sum(
            r["s"] for r in mine if "networks" in r["phase"] or "entropy model" in r["phase"]
        )
        mine[-1]["of_networks"] = whole / networks

    def _write(self, numbered: tuple[int, bytes]) -> None:
        index, data = numbered
        write_bytes(self.folder / f"{index}.out", data)


def _read(file: bytes) -> NDArray[np.uint8]:
    return to_rgb(decode_image(io.BytesIO(file)))
