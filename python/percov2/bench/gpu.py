"""``percov2 bench gpu``: compares the GPU engine with the CPU's on a card, and then times it.

Every record says its ``kind``: "measurement", or "missing" (what this machine lacks to be measured,
and how to get it).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from percov2.bench import gpu_jobs, model
from percov2.bench.coders import require
from percov2.bench.entropy import Step, take
from percov2.bench.gpu_device import Gpu, launches
from percov2.bench.gpu_jobs import SCHEDULE, Job, Size
from percov2.bench.report import environment
from percov2.bench.summary import line
from percov2.bench.timing import Effort, measure
from percov2.entropy import rans
from percov2.entropy.int_transformer import IntTransformer, random_tensors
from percov2.entropy.rans import as_array
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.torch import int_transformer as placed_model
from percov2.entropy.torch import token_coder as placed_coder
from percov2.entropy.transformer_config import TransformerConfig

SCHEMA = 1
MEASUREMENT, MISSING = "measurement", "missing"
NO_DEVICE = "torch finds no CUDA device: docs/how-to/gpu.md says what is needed and how to measure"
NO_TRITON = "triton is not installed: pip install 'percov2[gpu]'"
NO_CUDA = (
    "percov2's compiled module was built without CUDA: build it where nvcc is installed, with "
    "pip install --no-binary percov2 -C cmake.define.PERCOV2_CUDA=ON percov2"
)
BYTES_TO_FLOOR, MOST_LAUNCHES, COPIES_TO_HOST = 1.1, 3, 1
"""What a summary holds the engine against."""
Record = dict[str, Any]


SIZES = tuple(Size(256, 32, TransformerConfig(codebook_size=size)) for size in (256, 1024))


class Plan(NamedTuple):
    """What one run measures."""

    # Of the coder's kernels and of whole encoding; the first also of the model's layers.
    sizes: tuple[Size, ...]
    effort: Effort  # how long each call is repeated on a card
    cpu_effort: Effort  # and on the CPU beside it


FULL_PLAN = Plan(SIZES, Effort(1.0, 20, 1000), Effort(1.0, 3, 20))
QUICK_PLAN = Plan(SIZES, Effort(0.1, 5, 50), Effort(0.1, 1, 5))


def find() -> Gpu | None:
    """Return the current CUDA device, if torch finds one."""
    return Gpu() if torch.cuda.is_available() else None


def run(plan: Plan, gpu: Gpu | None = None) -> Record:
    """Measure on ``gpu`` and return the report, as it is written to JSON.

    The CPU engine takes as many threads as torch. Raises Mismatch (a RuntimeError) if the device
    returns anything but what the CPU returns.
    """
    triton, cuda = importlib.util.find_spec("triton") is not None, rans.cuda_built()
    found = {NO_DEVICE: gpu is not None, NO_TRITON: triton, NO_CUDA: cuda}
    missing = [why for why, there in found.items() if not there]
    if gpu is None or missing:
        records = [{"kind": MISSING, "section": "measured", "why": why} for why in missing]
    else:
        bench = Bench(gpu, plan, torch.get_num_threads(), gpu.bandwidth(plan.effort))
        records = [bench.bandwidth, *take(list(bench.steps()))]
    where = {
        "triton": importlib.metadata.version("triton") if triton else None,
        "cuda_kernels": cuda,
        "torch_cuda": torch.version.cuda,
        "devices": list(rans.cuda_devices()) if cuda else [],
    }
    return {
        "schema": SCHEMA,
        "kind": MISSING if missing else MEASUREMENT,
        "environment": {**environment(), **where},
        "records": records,
        "summary": list(summarize(records)),
    }


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run share; ``threads``: of the CPU engine."""

    gpu: Gpu
    plan: Plan
    threads: int
    bandwidth: Record

    def steps(self) -> Iterator[Step]:
        """Yield what is measured, one after the other; jobs are made when they are due."""

        def step(name: str, size: Size, make: Callable[..., Iterable[Job]], *more: int) -> Step:
            jobs = partial(make, self.gpu.place, size, *more)
            return name, lambda: [self.measured(size, job) for job in jobs()]

        sizes = self.plan.sizes
        for size in sizes:
            name = f"coder, V = {size.config.codebook_size}"
            yield step(name, size, gpu_jobs.coder_jobs, self.threads)
        yield step("layers", sizes[0], gpu_jobs.layer_jobs)
        for size in sizes:
            yield step(f"{size.config.codebook_size} codes", size, gpu_jobs.nearest_jobs)
        for size in sizes:
            yield f"whole, V = {size.config.codebook_size}", partial(self.paths, size)

    def measured(self, size: Size, job: Job) -> Record:
        """Return a job's record. Raises Mismatch unless the device returns what the CPU returns."""
        gpu, plan = self.gpu, self.plan
        if job.before is not None:
            job.before()
        found, expected = job.result(job.work()), job.reference()
        equal = len(found) == len(expected) and all(map(np.array_equal, found, expected))
        require(equal, f"{job.kernel} ({job.case}) does not return what the CPU returns")
        timing = gpu.time(job.work, plan.effort, job.before)
        speed = job.bytes / timing.median_s
        unfused = gpu.time(job.unfused, plan.effort) if job.unfused else None
        engine = measure(job.reference, plan.cpu_effort) if job.engine else None
        names = {"card": self.bandwidth["card"], "kernel": job.kernel, "case": job.case}
        sizes = {"codebook": size.config.codebook_size, "symbols": size.symbols}
        return {"kind": MEASUREMENT, "section": "measured", **names, **sizes} | {
            "gpu": timing.rate(size.symbols),
            "bytes": job.bytes,
            "bytes_per_s": speed,
            "share_of_peak": speed / self.bandwidth["peak_bytes_per_s"],
            "cpu": engine and engine.rate(size.symbols),
            "cpu_threads": self.threads,
            "unfused": unfused and unfused.rate(size.symbols),
            "launches": launches(gpu.trace(job.work))["kernels"],
        }

    def paths(self, size: Size) -> list[Record]:
        """Measure whole coding with the model on the device and either coder, and on the CPU.

        The weights are random, which changes no time; the tokens are drawn from the model. Raises
        Mismatch unless bytes and tokens are those of the CPU engine.
        """
        tensors, threads = random_tensors(size.config, 0), self.threads
        plain = TokenCoder(IntTransformer(size.config, tensors))
        placed = placed_model.IntTransformer(size.config, tensors, self.gpu.place, "triton")
        tokens = model.draw_tokens(plain, size.images, size.side)
        card, where = self.bandwidth["card"], {"cuda": "all", "cpu": "model"}
        coders: dict[str, TokenCoder] = {
            f"{where[name]} on {card}": placed_coder.TokenCoder(placed, name)
            for name in placed_coder.CODERS
        }
        coders["CPU engine"] = plain
        case = f"{size.images} x {size.tokens} tokens, V = {size.config.codebook_size}"
        shared = {"kind": MEASUREMENT, "section": "paths", "case": case, "threads": threads}
        records = []
        with model.torch_threads(threads):
            streams = model.encode(plain, tokens, SCHEDULE, threads)
            works: dict[str, dict[str, Callable[[], Any]]] = {
                who: {
                    "encode": partial(model.encode, coder, tokens, SCHEDULE, threads),
                    "decode": partial(model.decode, coder, streams, SCHEDULE, size.side, threads),
                }
                for who, coder in coders.items()
            }
            for who, ways in works.items():
                same = all(map(np.array_equal, ways["encode"](), streams))
                require(same, f"{who}: other bytes than on the CPU")
                same = np.array_equal(as_array(ways["decode"]()), tokens)
                require(same, f"{who}: other tokens than on the CPU")
            for who, what in itertools.product(works, ("encode", "decode")):
                # Every work ends with a copy to the host, for which the host waits.
                work, here = works[who][what], coders[who] is plain
                wall = measure(work, self.plan.cpu_effort if here else self.plan.effort)
                record = {**shared, "what": what, "who": who, "coder": coders[who].coder_name}
                record |= {"bytes": len(streams[0]), "wall": wall.rate(size.symbols)}
                traced = None if here else launches(self.gpu.trace(work))
                records.append({**record, "launches": traced})
        return records


def summarize(records: list[Record]) -> Iterator[Record]:
    """Yield the lines about bytes of the intervals, launches and copies of whole encoding."""
    for r in records:
        if r.get("kernel") == "symbol_intervals":
            # At least V logits, symbol, start and freq of 2 bytes each.
            least = r["symbols"] * (2 * r["codebook"] + 6)
            name = f"logits to intervals, V={r['codebook']}: bytes moved / fewest possible"
            yield line(name, r["bytes"] / least, BYTES_TO_FLOOR)
    for r in records:
        if r["section"] == "paths" and r["what"] == "encode" and r["coder"] == "cuda":
            name, found = f"encode {r['case']}, {r['who']}", r["launches"]
            after = len(found["after_transformer"])
            yield line(f"{name}: launches after the transformer", after, MOST_LAUNCHES)
            yield line(f"{name}: copies to the host", found["to_host"], COPIES_TO_HOST)
