"""``percov2 bench gpu``, which compares the GPU engine with the CPU engine and then times it.

The ``kind`` of a record is "measurement" or "missing". A "missing" record names what this machine
lacks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
from percov2.bench.timing import Effort, Record, measure
from percov2.entropy import rans
from percov2.entropy.int_transformer import IntTransformer, random_tensors
from percov2.entropy.rans import as_array
from percov2.entropy.token_coder import TokenCoder
from percov2.entropy.torch import int_transformer as placed_model
from percov2.entropy.torch import token_coder as placed_coder
from percov2.entropy.transformer_config import TransformerConfig

__all__ = ["FULL_PLAN", "NO_TRITON", "QUICK_PLAN", "SIZES", "Bench", "Plan", "find", "run"]

SCHEMA = 1
MEASUREMENT, MISSING = "measurement", "missing"
NO_DEVICE = "torch finds no CUDA device: see docs/how-to/gpu.md for the requirements"
NO_TRITON = "triton is not installed: pip install 'percov2[gpu]'"
NO_CUDA = (
    "percov2's compiled module was built without CUDA: build it where nvcc is installed, with "
    "pip install --no-binary percov2 -C cmake.define.PERCOV2_CUDA=ON percov2"
)
BYTES_TO_FLOOR, MOST_LAUNCHES, COPIES_TO_HOST = 1.1, 3, 1
"""Goals of the summary."""
SIZES = tuple(Size(256, 32, TransformerConfig(codebook_size=size)) for size in (256, 1024))


class Plan(NamedTuple):
    """The measurements of one run."""

    sizes: tuple[Size, ...]  # the model's layers are measured at the first size only
    effort: Effort  # on the GPU
    cpu_effort: Effort


FULL_PLAN = Plan(SIZES, Effort(1.0, 20, 1000), Effort(1.0, 3, 20))
QUICK_PLAN = Plan(SIZES, Effort(0.1, 5, 50), Effort(0.1, 1, 5))


def find() -> Gpu | None:
    """Return the current CUDA device, or None if torch finds none."""
    return Gpu() if torch.cuda.is_available() else None


def run(plan: Plan, gpu: Gpu | None = None) -> Record:
    """Measure on ``gpu`` and return the report as JSON values.

    If this machine lacks a GPU, triton or the CUDA kernels, the report only says so. The CPU engine
    uses as many threads as torch.

    Raises:
        Mismatch: the results of the GPU and the CPU differ.
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
    """The state that all measurements of a run share.

    ``threads`` is the number of threads of the CPU engine.
    """

    gpu: Gpu
    plan: Plan
    threads: int
    bandwidth: Record

    def steps(self) -> Iterator[Step]:
        """Yield the steps of a run. A step makes its jobs only when it runs."""

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
        """Return a job's record. Raise Mismatch if the results of the GPU and the CPU differ."""
        gpu, plan = self.gpu, self.plan
        if job.before is not None:
            job.before()
        found, expected = job.result(job.work()), job.reference()
        equal = len(found) == len(expected) and all(map(np.array_equal, found, expected))
        require(equal, f"{job.kernel} ({job.case}): the results of the GPU and the CPU differ")
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
        """Measure complete encoding and decoding on the CPU, and with each coder on the GPU.

        The weights are random, which does not change the times. The tokens are drawn from the
        model.

        Raises:
            Mismatch: bytes or tokens differ from those of the CPU engine.
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
        case = f"{size.images} x {size.side**2} tokens, V = {size.config.codebook_size}"
        shared = {"kind": MEASUREMENT, "section": "paths", "case": case, "threads": threads}
        records = []
        with model.torch_threads(threads):
            streams = model.encode(plain, tokens, SCHEDULE, threads)
            works: dict[tuple[str, str], Callable[[], Any]] = {}
            for who, coder in coders.items():
                encode = partial(model.encode, coder, tokens, SCHEDULE, threads)
                decode = partial(model.decode, coder, streams, SCHEDULE, size.side, threads)
                same = all(map(np.array_equal, encode(), streams))
                require(same, f"{who}: the bytes differ from those of the CPU")
                same = np.array_equal(as_array(decode()), tokens)
                require(same, f"{who}: the tokens differ from those of the CPU")
                works |= {(who, "encode"): encode, (who, "decode"): decode}
            for (who, what), work in works.items():
                # Each call ends with a copy to the host, so that wall time includes the kernels.
                here = coders[who] is plain
                wall = measure(work, self.plan.cpu_effort if here else self.plan.effort)
                record = {**shared, "what": what, "who": who, "coder": coders[who].coder_name}
                record |= {"bytes": len(streams[0]), "wall": wall.rate(size.symbols)}
                traced = None if here else launches(self.gpu.trace(work))
                records.append({**record, "launches": traced})
        return records


def summarize(records: list[Record]) -> Iterator[Record]:
    """Yield the summary's lines: bytes moved for intervals, and encoding's launches and copies."""
    for r in records:
        if r.get("kernel") == "symbol_intervals":
            # A symbol moves at least V logits, symbol, start and freq, of 2 bytes each.
            least = r["symbols"] * (2 * r["codebook"] + 6)
            name = f"logits to intervals, V={r['codebook']}: bytes moved / fewest possible"
            yield line(name, r["bytes"] / least, BYTES_TO_FLOOR)
    for r in records:
        if r["section"] == "paths" and r["what"] == "encode" and r["coder"] == "cuda":
            name, found = f"encode {r['case']}, {r['who']}", r["launches"]
            after = len(found["after_transformer"])
            yield line(f"{name}: launches after the transformer", after, MOST_LAUNCHES)
            yield line(f"{name}: copies to the host", found["to_host"], COPIES_TO_HOST)
