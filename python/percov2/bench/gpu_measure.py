"""Jobs on a device: compared with the CPU first, then timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from percov2.bench import gpu_compiled, gpu_jobs, gpu_layers, gpu_paths
from percov2.bench.gpu_cards import Card
from percov2.bench.gpu_compiled import Missing
from percov2.bench.gpu_device import Gpu, launches
from percov2.bench.gpu_jobs import Job
from percov2.bench.gpu_kernels import Size
from percov2.bench.gpu_paths import MEASUREMENT
from percov2.bench.gpu_plan import GpuPlan
from percov2.bench.gpu_predict import MISSING, PREDICTION
from percov2.bench.own_coder import require
from percov2.bench.results import rate
from percov2.bench.timing import Effort, measure
from percov2.entropy import rans

Record = dict[str, Any]
Step = tuple[str, Callable[[], list[Record]]]


@dataclass(frozen=True)
class Bench:
    """What all measurements of a run share.

    Attributes:
        gpu, card: the device; effort, cpu_effort: how long calls are repeated there and on the CPU.
        threads: of the CPU engine.
        peak: bytes per second of which shares are taken.
        predictions: (kernel, case) -> record of gpu_predict for this card.
    """

    gpu: Gpu
    card: Card
    effort: Effort
    cpu_effort: Effort
    threads: int
    peak: float
    predictions: dict[tuple[str, str], Record]


def lacking() -> Record | None:
    """A record of kind "missing" if this machine cannot run all kernels."""
    try:
        gpu_compiled.require_triton()
        if not rans.cuda_built():
            raise Missing(gpu_compiled.HOW_TO_GET_CUDA)
    except Missing as missing:
        return {"kind": MISSING, "section": "measured", "why": str(missing)}
    return None


def bandwidth(gpu: Gpu, card: Card, effort: Effort) -> Record:
    """A copy within the device, and the peak: as it is told, else by data sheet, else that copy."""
    copied, told = gpu.copy_bandwidth(effort), gpu.told_bandwidth()
    if told is not None:
        peak, source = told, "the device's memory clock and bus"
    elif math.isfinite(card.bandwidth):
        peak, source = card.bandwidth, "its data sheet"
    else:
        peak, source = copied, "a copy within the device"
    return {
        "kind": MEASUREMENT,
        "section": "bandwidth",
        "card": card.name,
        "copy_bytes_per_s": copied,
        "peak_bytes_per_s": peak,
        "peak_from": source,
    }


def steps(bench: Bench, plan: GpuPlan) -> Iterator[Step]:
    """What is measured, one after the other."""
    gpu = bench.gpu
    for size in plan.sizes:
        make = partial(gpu_jobs.coder_jobs, gpu, size, bench.threads)
        yield f"coder, V = {size.config.codebook_size}", partial(_jobs, bench, make)
    layers = partial(gpu_layers.layer_jobs, gpu, plan.sizes[0])
    yield "layers", partial(_jobs, bench, layers)
    for size in plan.sizes:
        yield f"{size.config.codebook_size} codes", partial(_nearest, bench, size)
    for size in plan.sizes:
        efforts = (bench.effort, bench.cpu_effort)
        whole = partial(gpu_paths.measure_paths, gpu, bench.card, size, bench.threads, *efforts)
        yield f"whole, V = {size.config.codebook_size}", whole


def _nearest(bench: Bench, size: Size) -> list[Record]:
    return [measured(bench, gpu_layers.nearest_job(bench.gpu, size))]


def _jobs(bench: Bench, make: Callable[[], Iterator[Job]]) -> list[Record]:
    return [measured(bench, job) for job in make()]


def measured(bench: Bench, job: Job) -> Record:
    """A job's record. Raises Mismatch unless the device returns what the CPU returns."""
    gpu, effort = bench.gpu, bench.effort
    name, first = " + ".join(row.name for row in job.rows), job.rows[0]
    if job.before is not None:
        job.before()
    found, expected = job.result(job.work()), job.reference()
    equal = len(found) == len(expected) and all(map(np.array_equal, found, expected))
    require(equal, f"{name} ({first.case}) does not return what the CPU returns")
    timing = gpu.time(job.work, effort, job.before)
    moved = sum(row.make().bytes for row in job.rows)
    beside = [bench.predictions[row.name, row.case] for row in job.rows]
    known = all(record["kind"] == PREDICTION for record in beside)
    return {
        "kind": MEASUREMENT,
        "section": "measured",
        "card": bench.card.name,
        "kernel": name,
        "case": first.case,
        "symbols": first.symbols,
        "gpu": rate(timing, first.symbols),
        "bytes": moved,
        "bytes_per_s": moved / timing.median_s,
        "share_of_peak": moved / timing.median_s / bench.peak,
        "cpu": rate(measure(job.reference, bench.cpu_effort), first.symbols)
        if job.engine
        else None,
        "cpu_threads": bench.threads,
        "unfused": rate(gpu.time(job.unfused, effort), first.symbols) if job.unfused else None,
        "launches": launches(gpu.trace(job.work))["kernels"],
        "predicted_s": sum(record["predicted_s"] for record in beside) if known else None,
        "predicted_limit": " + ".join(r["predicted_limit"] for r in beside) if known else None,
    }
